"""Time of a training step of KARST where the first blocks are frozen: with and without their cached outputs.

    python -m benchmarks.frozen_prefix [--batch 16] [--rounds 7] [--output FILE]

The backbone is that of `benchmarks.real_backbone` at 98 pixels, the images are those of `location`. `all blocks` adapts
every block, so nothing can be cached. The others adapt the last two of twelve blocks: `computed` runs the first ten in
each step, and `cached` reads their outputs. A step is forward, backward and AdamW as in the recipe `karst`, in bfloat16
where the processor has it. The contenders take turns in every round. The time is that of the processor, because other
load on the machine does not change it.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from adapters import Backbone, KarstConfig, attach
from adapters.data.checks import check_dataset
from adapters.data.datasets import read_dataset
from adapters.data.image_set import ImageTensors
from adapters.data.images import preprocess_of
from adapters.format.atomic_write import write_atomically
from adapters.training.batches import ModelRunner, TokenCache
from adapters.training.precision import autocast_dtype, cpu_capabilities

from . import real_backbone
from .accuracy_frozen import SIDE_PX, backbone
from .answers import write_images
from .common import machine, spread

LAST_BLOCKS = ("blocks.1[01].*",)
CONTENDERS = ("all blocks", "computed", "cached")
IMAGES_PER_CLASS = 4
WARM_UP_ROUNDS = 1  # it also fills the cache
OUTPUT = Path(__file__).parent / "results" / "frozen_prefix.json"


def main() -> None:
    """Measure, print a line per contender, write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16, help="images a step")
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of each contender, 2 or more")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="where the JSON goes")
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error(f"--rounds must be at least 2, got {options.rounds}: quartiles need it")
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder), "location", IMAGES_PER_CLASS, SIDE_PX)
        frozen = backbone()
        images = check_dataset(read_dataset(Path(folder)), preprocess_of(frozen)).train
        found = measure(frozen, images, options.batch, options.rounds)
    result = {"machine": machine(), "backbone": real_backbone.NAME, "side_px": SIDE_PX, **found}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(options.output, (json.dumps(result, indent=1) + "\n").encode())
    for name in CONTENDERS:
        ms, ratio = (found[key][name]["median"] for key in ("ms", "of_all_blocks"))
        print(f"{name}: {ms:.0f} ms a step, {ratio:.2f} of all blocks")


def measure(
    frozen: Backbone, images: ImageTensors, batch: int, rounds: int, sites: tuple[str, ...] = LAST_BLOCKS
) -> dict[str, Any]:
    """Return the processor's milliseconds per step of every contender, and its ratio to a step with all blocks.

    Args:
        sites: of the contenders with a frozen prefix.
    """
    steps = {}
    for name in CONTENDERS:
        config = KarstConfig(sites=None if name == "all blocks" else sites)
        runner = ModelRunner(attach(frozen, config, len(images.images.labels)), TokenCache(frozen, images, 0))
        if name == "computed":
            runner.prefix = None
        steps[name] = _step(runner, torch.tensor(images.images.targets), batch)
    times = [_round(steps) for _ in range(WARM_UP_ROUNDS + rounds)][WARM_UP_ROUNDS:]
    return {
        "batch": batch,
        "rounds": rounds,
        "ms": {name: spread([1e3 * one[name] for one in times]) for name in CONTENDERS},
        "of_all_blocks": {name: spread([one[name] / one["all blocks"] for one in times]) for name in CONTENDERS},
    }


def _step(runner: ModelRunner, targets: Tensor, batch: int) -> Callable[[], None]:
    """Return a training step on the same images each time: forward, backward, AdamW."""
    index = torch.arange(batch)
    model = runner.model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    dtype = autocast_dtype(torch.device("cpu"), cpu_capabilities())

    def step() -> None:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            logits = runner.call(model, index)
        loss = F.cross_entropy(logits.float(), targets[index])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return step


def _round(steps: dict[str, Callable[[], None]]) -> dict[str, float]:
    """Return the processor's seconds of a step of each contender, one after another."""
    taken = {}
    for name, step in steps.items():
        began = time.process_time()
        step()
        taken[name] = time.process_time() - began
    return taken


if __name__ == "__main__":
    main()
