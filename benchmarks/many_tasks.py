"""Cost of many tasks on one image, beside the pass of one task.

    python -m benchmarks.many_tasks [--models vit_base_patch16_224 ...] [--rounds 15] [--output FILE]

One image, in the engine of a worker (`Bank.score_images`), softmax and typicality included:
- `one`: one task without kernels, in a slot: what a call for a single task runs
- `heads`: 1,000 tasks without kernels, ten classes each, stacked
- `typical`: the same with typicality, as the recipe `instant` makes them; `one typical`: one of these
- `late`: ten tasks with adapters in the last two blocks (N = 2), which share the image's row up to there

The contenders take turns in every round, in reverse order in every second one. A ratio is the median over rounds of the
ratio within a round. Weights are random, because speed does not depend on them. The benchmark compares each answer with
that of a call for its task alone before it measures.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from adapters import Adapter, Backbone, Bank, Heads, ImageTasks, KarstConfig, Slot, load_backbone
from adapters.method.typicality import fit_typicality

from .common import machine, random_adapter, spread
from .mixed_batch import TOLERANCE, WARM_UP_ROUNDS, Contenders, time_round

MODELS = ("vit_base_patch16_224", "vit_small_patch16_224", "demo")
HEADS = 1000
LATE = 10
LATE_BLOCKS = 2
FEATURES = 200  # images behind the typicality of a task
RATIOS = {"heads": "one", "typical": "one typical", "late": "one"}
OUTPUT = Path(__file__).parent / "results" / "many_tasks.json"


def main() -> None:
    """Measure every model, print a table, write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", nargs="+", default=MODELS, help="timm names, or demo")
    parser.add_argument("--rounds", type=int, default=15, help="how often each contender runs")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="where the JSON goes")
    options = parser.parse_args()
    rows = [measure(load_backbone(name, pretrained=False), name, options.rounds) for name in options.models]
    Console().print(table(rows))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    found = {"machine": machine(), "heads": HEADS, "late": LATE, "late_blocks": LATE_BLOCKS, "rows": rows}
    options.output.write_text(json.dumps(found, indent=2) + "\n")
    print(f"written to {options.output}")


@torch.inference_mode()
def measure(backbone: Backbone, name: str, rounds: int) -> dict[str, Any]:
    """Return a row of the table.

    Raises:
        RuntimeError: an answer differs from that of its task alone; there is no measurement.
    """
    bank = Bank(backbone, slots=LATE + 2, max_rank=8, max_kernels=2)
    pixels = torch.randn(1, *backbone.input_size, generator=torch.Generator().manual_seed(0))
    plain, typical = _head(backbone, typical=False), _head(backbone, typical=True)
    sites = tuple(f"blocks.{bank.blocks - 1 - i}.*" for i in range(LATE_BLOCKS))
    late = [random_adapter(backbone, KarstConfig(kernels=2, sites=sites), seed=seed) for seed in range(LATE)]
    slots = [bank.put(adapter) for adapter in late]
    one, one_typical = bank.put(plain), bank.put(typical)
    heads, typical_heads = (bank.heads([bank.pack(adapter)] * HEADS) for adapter in (plain, typical))

    contenders: Contenders = {
        "one": lambda: _answer(bank, pixels, [one]),
        "one typical": lambda: _answer(bank, pixels, [one_typical]),
        "heads": lambda: _answer(bank, pixels, heads=heads),
        "typical": lambda: _answer(bank, pixels, heads=typical_heads),
        "late": lambda: _answer(bank, pixels, slots),
    }
    error = _largest_difference(bank, pixels, one, heads, slots)
    if error > TOLERANCE:
        raise RuntimeError(f"answers differ by {error:.2e} from those of single calls, allowed are {TOLERANCE:.0e}")
    every = track(range(WARM_UP_ROUNDS + rounds), name)
    times = [time_round(contenders, backwards=bool(i % 2)) for i in every][WARM_UP_ROUNDS:]
    return {
        "backbone": name,
        "rounds": rounds,
        "largest_difference": error,
        "passes": bank.passes([bank.first_block(bank.pack(adapter)) for adapter in late]),
        "ms": {own: spread([1e3 * taken[own] for taken in times]) for own in contenders},
        "ratios": {own: spread([taken[own] / taken[base] for taken in times]) for own, base in RATIOS.items()},
        "heads_mb": round(heads.size_bytes / 1e6, 1),
        "typical_mb": round(typical_heads.size_bytes / 1e6, 1),
    }


def _head(backbone: Backbone, *, typical: bool) -> Adapter:
    """Return an adapter without kernels."""
    adapter = random_adapter(backbone, KarstConfig(kernels=0, rescale="none"))
    if not typical:
        return adapter
    rows = torch.randn(FEATURES, backbone.width, generator=torch.Generator().manual_seed(1))
    return Adapter.create(
        adapter.tensors | fit_typicality(rows).tensors,
        config=adapter.config,
        backbone=adapter.backbone,
        fingerprint=adapter.fingerprint,
        labels=adapter.labels,
        preprocess=adapter.preprocess,
    )


def _answer(bank: Bank, pixels: torch.Tensor, slots: Sequence[Slot] = (), heads: Heads | None = None) -> object:
    """Return probabilities and typicality, as a worker computes them."""
    (found,) = bank.score_images(pixels, [ImageTasks(slots, heads)])
    own = [score.logits.float().softmax(0).numpy() for score in found.scores]
    return own, heads.probabilities(found.heads.logits) if heads and found.heads else None


def _largest_difference(bank: Bank, pixels: torch.Tensor, one: Slot, heads: Heads, slots: Sequence[Slot]) -> float:
    """Return the largest difference between the logits of shared rows and those of calls for one task."""
    (together,) = bank.score_images(pixels, [ImageTasks(slots, heads)])
    assert together.heads is not None
    parts = [*(score.logits for score in together.scores), *together.heads.logits.split(heads.classes)]
    alone = [bank.forward(pixels, [slot])[0] for slot in (*slots, one)]
    expected = [*alone[:-1], *alone[-1:] * HEADS]
    return max(float((part - own).abs().max()) for part, own in zip(parts, expected, strict=True))


def table(rows: list[dict[str, Any]]) -> Table:
    """Return a table of the ratios: medians, and the range between the quartiles."""
    title = f"One image: {HEADS} heads, {LATE} adapters in the last {LATE_BLOCKS} blocks, in passes of one task"
    out = Table("backbone", title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("one, ms", *RATIOS):
        out.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        ratios = [f"{r['median']:.2f} ({r['q1']:.2f}-{r['q3']:.2f})" for r in (row["ratios"][name] for name in RATIOS)]
        out.add_row(row["backbone"], f"{row['ms']['one']['median']:.1f}", *ratios)
    return out


if __name__ == "__main__":
    main()
