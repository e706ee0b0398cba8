"""Interface between gateways and workers: the calls and their answers. No Ray, no HTTP."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isnan
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from adapters import AdapterError

from .errors import FieldProblem, InvalidAdapter

if TYPE_CHECKING:
    from adapters import BankLimits  # at run time it would import torch, which the command line does not need

MAX_SEND_BYTES = 2 * 1024**2  # pixels that leave together to a worker: Ray passes arguments by value up to 4 MiB
ROUTING_DIGEST_CHARS = 16  # of a digest that workers report to routers: enough to tell adapters apart


class CallFailed(RuntimeError):
    """Error of the worker's code during one of several calls that were sent together; the worker logged it."""


@dataclass(frozen=True)
class PassStats:
    """Forward pass that computed an image: its worker, its size, and the image's own times."""

    worker: str
    images: int  # in the pass
    tasks: int  # in the pass
    load_ms: float
    queue_ms: float
    compute_ms: float


@dataclass(frozen=True)
class Answer:
    """Answer to one image.

    Attributes:
        probabilities: float32 (K,), one for each label of the adapter.
        typicality: in [0, 1]; None if the adapter has none.
    """

    probabilities: NDArray[np.float32]
    computed: PassStats
    typicality: float | None = None


@dataclass(frozen=True)
class TaskAnswers:
    """Answers of several adapters to one image, in few arrays: Ray would copy a thousand small ones one by one.

    Attributes:
        sizes: digest -> number of labels, in the order of the other lists.
        probabilities: float32, those of one adapter behind those of another.
        typicality: in [0, 1]; NaN for an adapter without typicality.
        computed: pass of each adapter.
        invalid: digest -> why the adapter cannot answer.
    """

    sizes: dict[str, int]
    probabilities: NDArray[np.float32]
    typicality: NDArray[np.float64]
    computed: list[PassStats]
    invalid: dict[str, InvalidAdapter]

    @classmethod
    def of(
        cls,
        answers: Sequence[tuple[str, NDArray[np.float32], float, PassStats]],
        invalid: Mapping[str, InvalidAdapter],
    ) -> "TaskAnswers":
        """Put answers together: digest, probabilities, typicality or NaN, and pass of each adapter."""
        return cls(
            {digest: len(own) for digest, own, _, _ in answers},
            np.concatenate([np.empty(0, np.float32), *(own for _, own, _, _ in answers)]),
            np.array([typicality for _, _, typicality, _ in answers], float),
            [stats for _, _, _, stats in answers],
            dict(invalid),
        )

    def answers(self) -> dict[str, Answer]:
        """Return the answer of each adapter that gave one, by digest."""
        parts = np.split(self.probabilities, np.cumsum([*self.sizes.values()])[:-1])
        shares = self.typicality.tolist()
        return {
            digest: Answer(part, stats, None if isnan(share) else share)
            for digest, part, stats, share in zip(self.sizes, parts, self.computed, shares, strict=bool(self.sizes))
        }


class Workers(Protocol):
    """All workers of a hub, as a gateway sees them."""

    async def classify(
        self, tenant: str, digest: str, images: Sequence[NDArray[np.uint8]], weight: float, *, idle: bool = False
    ) -> list[Answer]:
        """Return one answer for each image, all from one adapter.

        Args:
            tenant: whose share of the worker's time the images use.
            digest: sha256 of the adapter's file.
            images: preprocessed pixels, uint8 (3, H, W).
            weight: the tenant's share, relative to other tenants.
            idle: compute the images while no other image waits for classification.

        Raises:
            Unavailable: no worker answers, or the adapter cannot be loaded in time.
            InvalidAdapter: the adapter does not fit the workers' backbone.
            LimitReached: too many images of the tenant are queued.
        """

    async def classify_tasks(
        self, tenant: str, digests: Sequence[str], image: NDArray[np.uint8], weight: float, key: str
    ) -> TaskAnswers:
        """Return the answers of several adapters to one image, all from one worker.

        Args:
            tenant, weight: as in `classify`.
            key: calls with equal keys go to the same two workers, which then hold the adapters of these calls.
            digests: different adapters whose preprocessing is the same.
            image: preprocessed pixels, uint8 (3, H, W).

        Raises:
            Unavailable, LimitReached: as `classify`.
        """

    async def features(self, images: Sequence[NDArray[np.uint8]]) -> list[NDArray[np.float16]]:
        """Return the frozen backbone's pooled features (D,) of each image. Classification goes first.

        Args:
            images: preprocessed pixels, uint8 (3, H, W), as the backbone's own preprocessing makes them.

        Raises:
            Unavailable: no worker answers in time.
        """

    async def prefetch(self, digest: str) -> None:
        """Ask a worker to load an adapter before its first call. Never raises."""

    async def limits(self) -> "BankLimits":
        """Return the limits of the workers' banks.

        Raises:
            Unavailable: no worker is ready.
        """


def invalid_adapter(error: AdapterError) -> InvalidAdapter:
    """Translate the library's error; each faulty tensor and field keeps its own message."""
    return InvalidAdapter(str(error), [FieldProblem(p.where, p.message) for p in error.problems])
