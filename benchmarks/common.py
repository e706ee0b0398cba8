"""What the benchmarks share: random adapters, medians, and the machine that a result belongs to."""

import os
import platform
import statistics
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from adapters import Adapter, Backbone, KarstConfig, attach, extract


def random_adapter(backbone: Backbone, config: KarstConfig, *, seed: int = 0, classes: int = 10) -> Adapter:
    """An adapter that was never trained: every number is random, so every part of it changes the answers."""
    generator = torch.Generator().manual_seed(seed)
    model = attach(backbone, config, classes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            size = 0.2 if name.rpartition(".")[2] in ("a", "b", "c") else 0.05
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)
    return extract(model, [f"class {i}" for i in range(classes)])


def machine() -> dict[str, Any]:
    """Where and when a measurement was made."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def spread(values: list[float]) -> dict[str, float]:
    """The median and the quartiles."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": round(middle, 4), "q1": round(low, 4), "q3": round(high, 4)}


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
