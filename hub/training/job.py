"""One training job: what a gateway sends to the process that trains, and what comes back. No Ray, no Redis."""

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ..dataset_schemas import TrainingProgress

DEFAULT_MAX_PIXELS = 50_000_000


@dataclass(frozen=True)
class BackboneSource:
    """The backbone of a hub, as the process that trains loads it. `device` is the torch device of the training."""

    name: str
    checkpoint: Path | None
    image_size: int | None
    device: str


@dataclass(frozen=True)
class TrainingJob:
    """All that a training needs besides the store.

    Attributes:
        id: of the training; the adapter's metrics name it.
        title: of the report.
        snapshot: JSON text of the list of images.
        snapshot_digest: the adapter's metrics name it.
        fingerprint: of the workers' backbone, which the loaded weights must have.
        budget_s: seconds for KARST.
        max_pixels: limit on an image's width times height.
        max_kernels, max_rank: largest adapter that the workers take.
        threads: of torch.
        int8: whether the workers compute frozen layers in int8; the training then reports the agreement with float32.
    """

    id: str
    title: str
    recipe: str
    store_url: str
    snapshot: bytes
    snapshot_digest: str
    backbone: BackboneSource
    fingerprint: str
    budget_s: float
    max_kernels: int
    max_rank: int
    max_pixels: int = DEFAULT_MAX_PIXELS
    threads: int = 1
    int8: bool = False


@dataclass(frozen=True)
class TrainingResult:
    """The end of a training.

    Attributes:
        adapter: bytes of the adapter file; None: the training failed.
        report: zip of the report's files; None: the training ended before there was one.
        error: why the training failed, for the tenant.
    """

    adapter: bytes | None
    report: bytes | None
    warnings: tuple[str, ...] = ()
    error: str = ""


class TrainingInterrupted(Exception):
    """The process that trained ended without a result: it was killed, its node died, or its memory was exhausted."""


class Trainer(Protocol):
    """Runs training jobs outside of gateways and workers."""

    def run(self, job: TrainingJob) -> AsyncGenerator[TrainingProgress | TrainingResult, None]:
        """Yield the progress of a job, and its result last. To close the iterator kills the job.

        Raises:
            TrainingInterrupted: the process ended without a result. Another attempt may succeed.
        """
