"""What a worker gives for an image, and how it was computed."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Pass:
    """The forward pass of an image: who ran it, what shared it, and the milliseconds around it."""

    worker: str
    images: int
    tasks: int
    load_ms: float
    queue_ms: float
    compute_ms: float


@dataclass(frozen=True)
class Answer:
    """The probabilities (K,) float32 of one image, and how they were computed."""

    probabilities: np.ndarray
    computed: Pass
