"""Cost of a mixed batch, in which every image has its own adapter.

    python -m benchmarks.mixed_batch [--models demo ...] [--rounds 15] [--output FILE]

`Bank.forward` takes a batch of 8 images for 8 adapters. The benchmark compares it with these contenders:
- the frozen backbone alone on the same batch, without adapters
- eight merged models that take one image each, one after another: serving without a bank
- `quick`: the frozen backbone as a bank runs it (`adapters.serving`, `frozen_forms` and `blocks`), without adapters: a
  batch of heads
- `int8`: `Bank.forward` with all frozen layers in int8, where the CPU has VNNI
- `products`: each product that KARST adds, as one plain product of all rows, as if the images had one adapter

Quick plus products is the limit on this machine for code that does not merge.

The contenders take turns in every round, in reverse order in every second one. Other load on the machine therefore
affects them equally. A ratio is the median over rounds of the ratio within a round. Weights are random, because speed
does not depend on them. The benchmark checks the results against the merged models before it measures.
"""

import argparse
import gc
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from adapters import Backbone, Bank, KarstConfig, load_backbone
from adapters.backbone import Site, features, watch
from adapters.method import kronecker
from adapters.serving.blocks import class_token_layers, leave_out_other_tokens
from adapters.serving.frozen_forms import can_int8, measure_forms, prepack_layers

from .common import machine, random_adapter, spread

BATCH = 8
MODELS = ("demo", "vit_tiny_patch16_224", "vit_small_patch16_224", "vit_base_patch16_224")
KERNELS = (2, 8)
TOLERANCE = 1e-4
WARM_UP_ROUNDS = 2
RATIOS = ("mixed_to_frozen", "limit_to_frozen", "mixed_to_quick", "merged_to_frozen")
OUTPUT = Path(__file__).parent / "results" / "mixed_batch.json"

Contenders = dict[str, Callable[[], object]]


def main() -> None:
    """Measure every model with every N, print a table, write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", nargs="+", default=MODELS, help="timm names, or demo")
    parser.add_argument("--kernels", nargs="+", type=int, default=KERNELS, help="numbers of kernels N")
    parser.add_argument("--rounds", type=int, default=15, help="how often each contender runs")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="where the JSON goes")
    options = parser.parse_args()

    rows = []
    for name in options.models:
        backbone = load_backbone(name, pretrained=False)
        for kernels in options.kernels:
            rows.append({"backbone": name} | measure(backbone, KarstConfig(kernels=kernels), options.rounds))
            gc.collect()  # all eight merged models run before the next batch
    Console().print(table(rows))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps({"machine": machine(), "batch": BATCH, "rows": rows}, indent=2) + "\n")
    print(f"written to {options.output}")


@torch.inference_mode()
def measure(backbone: Backbone, config: KarstConfig, rounds: int) -> dict[str, Any]:
    """Return a row of the table.

    Raises:
        RuntimeError: the mixed batch and the merged models do not agree; there is no measurement.
    """
    adapters = [random_adapter(backbone, config, seed=seed) for seed in range(BATCH)]
    merged = [adapter.merge(backbone) for adapter in adapters]
    forms = measure_forms(backbone, BATCH)
    bank = Bank(backbone, slots=BATCH, forms=forms)
    slots = [bank.put(adapter) for adapter in adapters]
    pixels = torch.randn(BATCH, *backbone.input_size, generator=torch.Generator().manual_seed(0))
    quick = backbone.clone()
    alone = class_token_layers(quick, pixels[:1], partial(torch.allclose, atol=TOLERANCE))
    prepack_layers(quick, backbone, forms)
    leave_out_other_tokens(quick, alone)

    def run_merged() -> list[Tensor]:
        return [model(image)[0] for model, image in zip(merged, pixels.split(1), strict=True)]

    contenders: Contenders = {
        "frozen": lambda: features(backbone.model, pixels),
        "quick": lambda: features(quick, pixels),
        "mixed": lambda: bank.forward(pixels, slots),
        "products": products(quick, backbone.sites, config, pixels),
        "merged": run_merged,
    }
    if can_int8(backbone):
        small = Bank(backbone, slots=BATCH, forms=measure_forms(backbone, BATCH, int8=True))
        small_slots = [small.put(adapter) for adapter in adapters]
        contenders["int8"] = lambda: small.forward(pixels, small_slots)
    pairs = zip(bank.forward(pixels, slots), run_merged(), strict=True)
    error = max((mixed - alone).abs().max().item() for mixed, alone in pairs)
    if error > TOLERANCE:
        raise RuntimeError(f"mixed and merged differ by {error:.2e}, allowed are {TOLERANCE:.0e}")

    label = f"{backbone.name}, N = {config.kernels}"
    every = track(range(WARM_UP_ROUNDS + rounds), label)
    times = [time_round(contenders, backwards=bool(i % 2)) for i in every][WARM_UP_ROUNDS:]
    return {
        "kernels": config.kernels,
        "rank": config.rank,
        "factor": config.factor,
        "rescale": config.rescale,
        "rounds": rounds,
        "largest_difference": error,
        "ms": {name: spread([1e3 * taken[name] for taken in times]) for name in contenders},
        "frozen_layers": forms.describe(),
        "quick_to_frozen": spread([taken["quick"] / taken["frozen"] for taken in times]),
        "int8_to_frozen": spread([taken["int8"] / taken["frozen"] for taken in times])
        if "int8" in contenders
        else None,
        "mixed_to_frozen": spread([taken["mixed"] / taken["frozen"] for taken in times]),
        "mixed_to_quick": spread([taken["mixed"] / taken["quick"] for taken in times]),
        "limit_to_frozen": spread([(taken["quick"] + taken["products"]) / taken["frozen"] for taken in times]),
        "merged_to_frozen": spread([taken["merged"] / taken["frozen"] for taken in times]),
    }


def products(model: nn.Module, sites: Sequence[Site], config: KarstConfig, pixels: Tensor) -> Callable[[], None]:
    """Return a function with all products that KARST adds to a pass: x B^T, then C, then A, added to the output."""
    jobs: list[Callable[[], Tensor]] = []
    made: dict[tuple[tuple[int, int], ...], list[Tensor]] = {}  # layers of the same kind share their input

    def note(site: Site) -> Callable[..., None]:
        (_, p, q), (_, splits, a, _), (_, _, b) = kronecker.shapes(
            site.d_in, site.d_out, site.splits, kernels=config.kernels, rank=config.rank, factor=config.factor
        )
        both = config.kernels * config.rank

        def noted(_linear: nn.Module, args: tuple[Tensor, ...]) -> None:
            rows = args[0].numel() // site.d_in
            shapes = (rows * q, b), (b, both), (rows * both, q), (q, p), (rows * p, both), (both, a), (rows * p, a)
            if shapes not in made:
                made[shapes] = [torch.randn(shape) for shape in shapes]
            x, own_b, by_c, own_c, by_a, own_a, y = made[shapes]
            jobs.extend([partial(torch.mm, x, own_b), partial(torch.mm, by_c, own_c)])
            jobs.extend([partial(y.addmm_, by_a, own_a)] * splits)

        return noted

    watch(model, pixels, [(model.get_submodule(site.name), note(site)) for site in sites])

    def run() -> None:
        for job in jobs:
            job()

    return run


def time_round(contenders: Contenders, *, backwards: bool) -> dict[str, float]:
    """Return the seconds of each contender, one after another."""
    taken = {}
    for name, run in reversed(contenders.items()) if backwards else contenders.items():
        start = time.perf_counter()
        run()
        taken[name] = time.perf_counter() - start
    return taken


def table(rows: list[dict[str, Any]]) -> Table:
    """Print the rows: medians, and the range between the quartiles."""
    title = f"Batch of {BATCH}, {BATCH} adapters, rank 8, factor 8, re-scaling per channel"
    out = Table("backbone", title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("N", "frozen", "mixed ms", "mixed / frozen", "limit", "mixed / quick", "merged / frozen"):
        out.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        ms = [f"{row['ms'][name]['median']:.1f}" for name in ("frozen", "mixed")]
        ratios = [
            f"{ratio['median']:.2f} ({ratio['q1']:.2f}-{ratio['q3']:.2f})" for ratio in (row[name] for name in RATIOS)
        ]
        out.add_row(row["backbone"], str(row["kernels"]), *ms, *ratios)
    return out


if __name__ == "__main__":
    main()
