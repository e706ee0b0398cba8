"""Time and memory of a training step of KARST, beside the official form and peft's LoKr and LoRA.

    python -m benchmarks.train_step [--backbone NAME] [--batch 32] [--rounds 7] [--kernels 2 8] [--output FILE]

The official form writes dW out, with a `torch.kron` for each kernel (and for each of q, k and v), and multiplies by
W0 + dW. Ours uses `adapters.kronecker.apply`. LoKr and LoRA are those of Hugging Face's peft, on the same layers, with
the ranks nearest to as many trained parameters. A step is forward, backward and AdamW in float32 on random images.
Weights are random, because speed does not depend on them. The official form and ours hold the same values. The
benchmark checks that their logits and gradients agree before it measures.

The four contenders take turns in every round, so other load on the machine affects them equally. A ratio is the median
over rounds of the ratio within a round. Memory is the peak of two steps in a process of its own, on top of the loaded
backbone. It is resident memory as Linux counts it, or allocated memory on a GPU. The benchmark uses a GPU if the
machine has one.
"""

import argparse
import copy
import json
import math
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from adapters import Backbone, BackboneError, KarstConfig, attach, load_backbone
from adapters.method.karst import KarstLayer, KarstModel

from .accuracy_methods import Adapted, karst_count, lokr, lora, trainable
from .common import machine, spread

BACKBONE = "vit_base_patch16_224"
CLASSES = 100
CONTENDERS = ("ours", "official", "LoKr", "LoRA")
# Target: the official form's time over ours, at N kernels.
BARS = {2: 1.2, 8: 1.0}
TOLERANCE = 1e-4
WARM_UP_ROUNDS = 1
OUTPUT = Path(__file__).parent / "results" / "train_step.json"


def main() -> None:
    """Measure, print a table and the bars, write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default=BACKBONE, help="a timm name, or demo")
    parser.add_argument("--batch", type=int, default=32, help="images a step; fewer where memory is short")
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of each contender, 2 or more")
    parser.add_argument("--kernels", nargs="+", type=int, default=list(BARS), help="numbers of kernels N")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="where the JSON goes")
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error(f"--rounds must be at least 2, got {options.rounds}: quartiles need it")

    try:
        memory = {n: {c: memory_mb(options.backbone, c, n, options.batch) for c in CONTENDERS} for n in options.kernels}
        backbone = _load(options.backbone)
        rows = [measure(backbone, n, options.batch, options.rounds) | {"memory_mb": memory[n]} for n in options.kernels]
    except (BackboneError, MismatchError, OSError, RuntimeError) as error:  # out of memory is a RuntimeError
        raise SystemExit(f"stopped: {error}") from None
    result = {
        "machine": machine() | {"device": _device_name()},
        "backbone": backbone.name,
        "batch": options.batch,
        "rounds": options.rounds,
        "rows": rows,
    }
    Console().print(table(result))
    print("\n".join(bars(rows)))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written to {options.output}")


class MismatchError(RuntimeError):
    """A difference between the official form and ours; the message gives the tensor and the size."""


class OfficialLinear(nn.Module):
    """Frozen linear layer with KARST in the official form: y = (1 + s1) * ((W0 + dW) x + b0) + s2, with dW written out.

    A plain, working version of the published code, which cannot run (docs/method.md). The values are a `KarstLayer`'s.
    """

    def __init__(self, linear: nn.Linear, numbers: KarstLayer) -> None:
        super().__init__()
        self.linear, self.numbers = linear, numbers

    def forward(self, x: Tensor) -> Tensor:
        n = self.numbers
        if n.rescales_in:
            x = x * (1 + n.in_s1) + n.in_s2
        delta = torch.zeros_like(self.linear.weight)
        for c, a, b in zip(n.c, n.a, n.b, strict=True):  # per kernel: (p, q), (S, d_out / S p, R), (R, d_in / q)
            delta = delta + torch.cat([torch.kron(c, split @ b) for split in a])
        y = F.linear(x, self.linear.weight + n.gain * delta, self.linear.bias)
        return y * (1 + n.s1) + n.s2 if n.rescales_out else y


def measure(backbone: Backbone, kernels: int, batch: int, rounds: int) -> dict[str, Any]:
    """Return a row: milliseconds per step of every contender, and ratios to ours.

    Raises:
        MismatchError: the official form and ours differ; there is no measurement.
    """
    models: dict[str, Any] = {name: contender(name, backbone, kernels) for name in CONTENDERS}
    pixels, targets = _batch(backbone, batch)
    difference = check(models["ours"], models["official"], backbone, pixels[:2], targets[:2])
    steps = {name: step_of(model, pixels, targets) for name, model in models.items()}
    label = f"{backbone.name}, N = {kernels}"
    times = [time_round(steps) for _ in track(range(WARM_UP_ROUNDS + rounds), label)][WARM_UP_ROUNDS:]
    return {
        "kernels": kernels,
        "rank": KarstConfig().rank,
        "factor": KarstConfig().factor,
        "rescale": KarstConfig().rescale,
        "parameters": {name: trainable(model) for name, model in models.items()},
        "largest_difference": difference,
        "ms": {name: spread([1e3 * taken[name] for taken in times]) for name in CONTENDERS},
        "to_ours": {name: spread([taken[name] / taken["ours"] for taken in times]) for name in CONTENDERS[1:]},
    }


def contender(name: str, backbone: Backbone, kernels: int) -> nn.Module:
    """Return the model of one of `CONTENDERS`, in training mode."""
    torch.manual_seed(0)  # ours and the official form get the same values
    config = KarstConfig(kernels=kernels)
    if name in ("ours", "official"):
        ours = attach(backbone, config, CLASSES)
        _randomise(ours)
        return (ours if name == "ours" else official(ours)).train()
    body = {"LoKr": lokr, "LoRA": lora}[name](backbone, karst_count(backbone, config))
    return Adapted(body, nn.Linear(backbone.width, CLASSES, device=backbone.device)).train()


def official(ours: KarstModel) -> Adapted:
    """Return the official form with the same values, in tensors of its own."""
    body = ours.backbone.clone()
    for site in ours.backbone.sites:
        numbers: Any = ours.layers[site.name.replace(".", "/")]
        body.set_submodule(site.name, OfficialLinear(body.get_submodule(site.name), copy.deepcopy(numbers)))
    return Adapted(body, copy.deepcopy(ours.head))


def check(ours: KarstModel, other: Adapted, backbone: Backbone, pixels: Tensor, targets: Tensor) -> float:
    """Return the largest difference of the two KARST forms in logits and gradients, relative to each tensor's maximum.

    Raises:
        MismatchError: it is above `TOLERANCE`.
    """
    sites = [site.name for site in backbone.sites]
    numbers: tuple[dict[str, Any], dict[str, Any]] = (
        {name: ours.layers[name.replace(".", "/")] for name in sites} | {"head": ours.head},
        {name: other.body.get_submodule(name).numbers for name in sites} | {"head": other.head},
    )
    found: list[dict[str, Any]] = []
    for model, modules in zip((ours, other), numbers, strict=True):
        logits = model(pixels)
        F.cross_entropy(logits, targets).backward()
        gradients = {f"{at}.{k}": p.grad for at, module in modules.items() for k, p in module.named_parameters()}
        found.append({"logits": logits.detach()} | gradients)
        model.zero_grad(set_to_none=True)
    differences = {
        name: float((tensor - found[1][name]).abs().max() / tensor.abs().max().clamp(min=1e-30))
        for name, tensor in found[0].items()
    }
    worst = next((n for n, d in differences.items() if not math.isfinite(d)), max(differences, key=differences.get))
    if not differences[worst] <= TOLERANCE:
        raise MismatchError(
            f"the official form and ours differ by {differences[worst]:.1e} of the largest number in {worst}, "
            f"allowed are {TOLERANCE:.0e}"
        )
    return differences[worst]


def step_of(model: nn.Module, pixels: Tensor, targets: Tensor) -> Callable[[], None]:
    """Return one training step as a function: forward, backward, AdamW."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        loss = F.cross_entropy(model(pixels), targets)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return step


def time_round(steps: dict[str, Callable[[], None]]) -> dict[str, float]:
    """Return the seconds per step of each contender, one after another."""
    taken = {}
    for name, step in steps.items():
        _synchronise()
        began = time.perf_counter()
        step()
        _synchronise()
        taken[name] = time.perf_counter() - began
    return taken


def memory_mb(backbone: str, name: str, kernels: int, batch: int) -> float:
    """Return the peak memory in MB of two training steps over the loaded backbone, in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_peak_mb, backbone, name, kernels, batch).result()


def bars(rows: list[dict[str, Any]]) -> list[str]:
    """Return the targets and their verdicts."""
    lines = []
    for row in rows:
        if (bar := BARS.get(row["kernels"])) is not None:
            ratio = row["to_ours"]["official"]
            verdict = "holds" if ratio["median"] >= bar else "does not hold"
            lines.append(
                f"N = {row['kernels']}: ours at least {bar} times as fast as the official form: {verdict}; "
                f"{ratio['median']:.2f} times (quartiles {ratio['q1']:.2f} to {ratio['q3']:.2f})"
            )
    return lines


def table(result: dict[str, Any]) -> Table:
    """Print the result."""
    title = f"A training step of {result['backbone']}, batch {result['batch']}, {result['machine']['device']}"
    out = Table("N", "", title=title, box=box.SIMPLE_HEAD)
    for heading in ("numbers", "ms", "to ours", "peak MB"):
        out.add_column(heading, justify="right", no_wrap=True)
    for row in result["rows"]:
        for name in CONTENDERS:
            ratio = row["to_ours"].get(name)
            out.add_row(
                str(row["kernels"]),
                name,
                f"{row['parameters'][name]:,}",
                f"{row['ms'][name]['median']:.1f}",
                f"{ratio['median']:.2f} ({ratio['q1']:.2f}-{ratio['q3']:.2f})" if ratio else "1",
                f"{row['memory_mb'][name]:.0f}",
            )
    return out


def _peak_mb(backbone_name: str, name: str, kernels: int, batch: int) -> float:
    """Measure the peak; runs in a process of its own."""
    backbone = _load(backbone_name)
    before = _restart_peak()
    step = step_of(contender(name, backbone, kernels), *_batch(backbone, batch))
    for _ in range(2):  # the second has AdamW's moments from the start
        step()
    return round((_peak_bytes() - before) / 1e6, 1)


def _restart_peak() -> int:
    """Reset the peak memory of this process.

    Returns:
        The memory that this process holds now, in bytes.

    Raises:
        OSError: no GPU, and no Linux /proc.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # man 5 proc: "reset the peak resident set size"
    return _peak_bytes()


def _peak_bytes() -> int:
    """Return the peak memory of this process since `_restart_peak`, in bytes.

    Not getrusage's ru_maxrss: a new process inherits that from its parent, and a large parent hides a small child.
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def _randomise(model: KarstModel) -> None:
    """Give every parameter a random value: with B, s1 and s2 at zero most errors and gradients would be invisible."""
    with torch.no_grad():
        for name, parameter in model.layers.named_parameters():
            parameter.normal_(std=0.2 if name.rpartition(".")[2] in ("a", "b", "c") else 0.05)


def _batch(backbone: Backbone, batch: int) -> tuple[Tensor, Tensor]:
    """Return random normalised pixels (B, 3, H, W) and targets (B,)."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(batch, *backbone.input_size, generator=generator)
    targets = torch.randint(0, CLASSES, (batch,), generator=generator)
    return pixels.to(backbone.device), targets.to(backbone.device)


def _load(name: str) -> Backbone:
    torch.manual_seed(0)
    return load_backbone(name, device="cuda" if torch.cuda.is_available() else "cpu", pretrained=False)


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


if __name__ == "__main__":
    main()
