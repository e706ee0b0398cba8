"""Shared parts of the benchmarks: random adapters, medians, and the machine of a result."""

import os
import platform
import statistics
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from adapters import Adapter, Backbone, KarstConfig, attach, extract


def random_adapter(backbone: Backbone, config: KarstConfig, *, seed: int = 0, classes: int = 10) -> Adapter:
    """Return an untrained adapter with random numbers, so that every part of it changes the logits."""
    generator = torch.Generator().manual_seed(seed)
    model = attach(backbone, config, classes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            size = 0.2 if name.rpartition(".")[2] in ("a", "b", "c") else 0.05
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)
    return extract(model, [f"class {i}" for i in range(classes)])


def copy_of(adapter: Adapter, number: int, dtype: torch.dtype = torch.float32) -> Adapter:
    """Return the same numbers under another digest per `number`."""
    return Adapter.create(
        {name: tensor.to(dtype) for name, tensor in adapter.tensors.items()},
        config=adapter.config,
        backbone=adapter.backbone,
        fingerprint=adapter.fingerprint,
        labels=adapter.labels,
        preprocess=adapter.preprocess,
        created=f"2026-01-01T00:00:00.{number:06d}+00:00",
    )


def machine() -> dict[str, Any]:
    """Return the machine and the date of a measurement."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def spread(values: list[float]) -> dict[str, float]:
    """Return the median and the quartiles."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": round(middle, 4), "q1": round(low, 4), "q3": round(high, 4)}


def markdown_table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
