"""The Ray Serve ingress: the HTTP application in front, the workers behind. Deployed by `app.build`."""

import asyncio
import logging
from collections.abc import Callable, Sequence

import numpy as np
import ray
from fastapi import FastAPI
from ray import serve
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle

from adapters import BankLimits

from ..errors import HubError, Unavailable
from ..observability import request_context, tracing
from ..observability.request_log import RequestMetrics
from ..worker_api import Answer, Workers
from .gateway_metrics import GatewayMetrics
from .ray_compat import ray_metrics
from .rendezvous import WARM

logger = logging.getLogger(__name__)

READY_S = 2.0
COLD_S = 600.0  # until a worker is there, where none need stay: a node may have to start, and load its backbone
TRIES, PAUSE_S = 3, 0.2  # of a call whose worker dies under it, and before the next one


class ServeWorkers:
    """`service.Workers` over a deployment handle: an adapter's calls go to its owners while they have room."""

    def __init__(self, handle: DeploymentHandle, to_zero: bool = False) -> None:
        """
        Args:
            to_zero: there may be no worker, and that is no failure: a call waits until one has started for it.
        """
        self._handle = handle
        self._to_zero = to_zero
        self._limits: BankLimits | None = None

    async def classify(self, tenant: str, digest: str, images: Sequence[np.ndarray], weight: float) -> list[Answer]:
        with tracing.worker_call_span(len(images)):
            call = tenant, digest, images, weight, request_context.call_origin()
            answers = await self._call(self._near(digest).answer, *call)
            if isinstance(answers, Unavailable):  # this worker cannot load the adapter; another one may hold it
                answers = await self._call(self._near(digest + WARM).answer, *call)
            if isinstance(answers, HubError):
                raise answers
            return answers

    async def prefetch(self, digest: str) -> None:
        try:
            await self._call(self._near(digest).prefetch, digest)
        except HubError as error:
            logger.info("adapter %s was not prefetched: %s", digest[:12], error)

    async def limits(self) -> BankLimits:
        """Asked anew each time, since the answer tells of a worker; but not where no worker need be there: what asks
        whether the hub is ready would keep one up for ever."""
        if not self._to_zero:
            return await self._call(self._handle.limits, timeout_s=READY_S)
        if self._limits is None:
            self._limits = await self._call(self._handle.limits, timeout_s=COLD_S)
        return self._limits

    def _near(self, digest: str) -> DeploymentHandle:
        """A handle to the worker that has the adapter, if one has."""
        # Not multiplexed_model_id: Serve would split batches by it, and no batch would ever mix tasks.
        return self._handle.options(session_id=digest)

    async def _call(self, method, *args, timeout_s: float | None = None):
        for _ in range(TRIES - 1):
            try:
                return await self._once(method, args, timeout_s)
            except _Lost:  # nothing was changed by half a call, so another worker may do it again
                await asyncio.sleep(PAUSE_S)
        return await self._once(method, args, timeout_s)

    async def _once(self, method, args, timeout_s: float | None):
        response = method.remote(*args)
        try:
            return await (asyncio.wait_for(response, timeout_s) if timeout_s else response)
        except asyncio.CancelledError:  # the client went away: what waits at the worker need not be computed
            response.cancel()
            raise
        except HubError:
            raise
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, HubError):
                raise error.cause from error
            raise
        except BackPressureError as error:
            raise Unavailable("the workers have as many requests waiting as they take; try again") from error
        except (ReplicaUnavailableError, ray.exceptions.RayActorError) as error:
            raise _Lost("the workers that had the request died; try again", retry_after_s=5) from error
        except (TimeoutError, DeploymentUnavailableError) as error:
            raise Unavailable("no worker answers; one may still be loading its backbone", retry_after_s=5) from error


class _Lost(Unavailable):
    """The worker died while it had the call."""


@serve.ingress()
class Gateway:
    """Puts `make`'s application in front of the workers."""

    def __init__(
        self, make: Callable[[Workers, RequestMetrics], FastAPI], worker: DeploymentHandle, to_zero: bool
    ) -> None:
        self._make = make
        self._workers = ServeWorkers(worker, to_zero)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._make(self._workers, GatewayMetrics(ray_metrics()))
