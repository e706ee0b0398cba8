"""The Ray Serve ingress: one replica is one gateway, with the HTTP application and a handle to the workers."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import numpy as np
from fastapi import FastAPI
from numpy.typing import NDArray
from ray import serve
from ray.serve.handle import DeploymentHandle

from adapters import BankLimits

from ..api.stock_proxy import end_pipelined_requests
from ..errors import HubError, Unavailable
from ..observability import request_context, tracing
from ..observability.request_log import RequestMetrics
from ..training.job import Trainer
from ..worker_api import Answer, TaskAnswers, Workers
from .gateway_metrics import GatewayMetrics
from .ray_compat import LateIngress, ray_metrics
from .rendezvous import RESIDENT_ONLY, known_workers
from .trainings import RayTrainer
from .worker_links import WorkerDied, WorkerLinks, hub_errors

T = TypeVar("T")
logger = logging.getLogger(__name__)

READY_TIMEOUT_S = 2.0
COLD_START_TIMEOUT_S = 600.0  # when the hub scales to zero: a node may have to start and load its backbone
MAX_ATTEMPTS = 3  # of a call whose worker dies
RETRY_PAUSE_S = 0.2


class ServeWorkers:
    """`Workers` through a Serve deployment handle, with retries on another worker."""

    def __init__(self, handle: DeploymentHandle[Any], scale_to_zero: bool = False) -> None:
        """
        Args:
            scale_to_zero: the hub may have no worker. A call then waits until one has started.
        """
        self._handle = handle
        self._links = WorkerLinks(handle, known_workers())
        self._scale_to_zero = scale_to_zero
        self._limits: BankLimits | None = None

    async def classify(
        self, tenant: str, digest: str, images: Sequence[np.ndarray], weight: float, *, idle: bool = False
    ) -> list[Answer]:
        with tracing.worker_call_span(len(images)):
            arguments = tenant, digest, images, weight, request_context.call_origin(), idle
            answers = await self._answer(digest, arguments)
            if isinstance(answers, Unavailable):  # this worker cannot load the adapter; another one may hold it
                answers = await self._answer(digest + RESIDENT_ONLY, arguments)
            if isinstance(answers, HubError):
                raise answers
            return answers

    async def _answer(self, key: str, arguments: tuple[Any, ...]) -> list[Answer] | HubError:
        """Return the answers of the best worker for a call, or its error as a value."""
        tenant, _, images, _, _, idle = arguments

        async def attempt() -> list[Answer] | HubError:
            # A call in idle turns may wait long; it leaves alone, and with Serve's own routing.
            link = None if idle else self._links.choose(key)
            if link is not None:
                return await link.call(tenant, arguments, sum(x.nbytes for x in images))
            answers: list[Answer] | HubError = await _call_once(self._handle_for(key).answer, arguments, None)
            return answers

        return await _repeated(attempt)

    async def classify_tasks(
        self, tenant: str, digests: Sequence[str], image: np.ndarray, weight: float, key: str
    ) -> TaskAnswers:
        with tracing.worker_call_span(1):
            arguments = tenant, list(digests), image, weight, request_context.call_origin()
            answers = await self._call(self._handle_for(key).answer_tasks, *arguments)
            if isinstance(answers, HubError):
                raise answers
            found: TaskAnswers = answers
            return found

    async def features(self, images: Sequence[np.ndarray]) -> list[NDArray[np.float16]]:
        found = await self._call(self._handle.features, list(images))
        if isinstance(found, HubError):
            raise found
        rows: list[NDArray[np.float16]] = found
        return rows

    async def prefetch(self, digest: str) -> None:
        try:
            await self._call(self._handle_for(digest).prefetch, digest)
        except HubError as error:
            logger.info("adapter %s was not prefetched: %s", digest[:12], error)

    async def limits(self) -> BankLimits:
        """Return the limits of the workers' banks; the call also shows that a worker answers.

        A hub that scales to zero asks only once: otherwise every readiness probe would keep a worker running.
        """
        if self._scale_to_zero and self._limits is not None:
            return self._limits
        timeout_s = COLD_START_TIMEOUT_S if self._scale_to_zero else READY_TIMEOUT_S
        found: BankLimits = await self._call(self._handle.limits, timeout_s=timeout_s)
        self._limits = found
        return found

    def _handle_for(self, key: str) -> DeploymentHandle[Any]:
        """Return a handle whose calls are routed by this key, see `rendezvous.RoutingTable`."""
        # Not multiplexed_model_id: Serve splits batches by it, and then no batch would mix tasks.
        return self._handle.options(session_id=key)

    async def _call(self, method: DeploymentHandle[Any], *args: object, timeout_s: float | None = None) -> Any:
        return await _repeated(lambda: _call_once(method, args, timeout_s))


async def _repeated(attempt: Callable[[], Awaitable[T]]) -> T:
    """Return the result of a call; repeat it when its worker dies, since calls change nothing."""
    for _ in range(MAX_ATTEMPTS - 1):
        try:
            return await attempt()
        except WorkerDied:
            await asyncio.sleep(RETRY_PAUSE_S)
    return await attempt()


async def _call_once(method: DeploymentHandle[Any], args: tuple[object, ...], timeout_s: float | None) -> Any:
    response = method.remote(*args)
    with hub_errors():
        async with asyncio.timeout(timeout_s):  # `wait_for` of Python 3.11 drops some cancellations
            try:
                return await response
            except asyncio.CancelledError:  # the client disconnected: the worker drops images that still wait
                response.cancel()  # type: ignore[no-untyped-call]  # Ray has no types here
                raise


@serve.ingress()
class Gateway(LateIngress):
    """Replica that serves the HTTP application in front of the workers."""

    def __init__(
        self,
        make_app: Callable[[Workers, Trainer, RequestMetrics], FastAPI],
        worker: DeploymentHandle[Any],
        scale_to_zero: bool,
        training_cpus: int,
        training_gpus: float,
    ) -> None:
        self._make_app = make_app
        self._trainer = RayTrainer(training_cpus, training_gpus)
        self._workers = ServeWorkers(worker, scale_to_zero)

    def build_asgi_app(self) -> FastAPI:
        end_pipelined_requests()  # Ray starts uvicorn after this
        return self._make_app(self._workers, self._trainer, GatewayMetrics(ray_metrics()))
