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

from .answers import Answer
from .errors import HubError, Unavailable
from .service import Workers

logger = logging.getLogger(__name__)

READY_S = 2.0


class ServeWorkers:
    """`service.Workers` over a deployment handle: an adapter's calls go to the same worker while it has room."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle

    async def classify(self, tenant: str, digest: str, images: Sequence[np.ndarray], weight: float) -> list[Answer]:
        return await self._call(self._near(digest).classify, tenant, digest, images, weight)

    async def prefetch(self, digest: str) -> None:
        try:
            await self._call(self._near(digest).prefetch, digest)
        except HubError as error:
            logger.info("adapter %s was not prefetched: %s", digest[:12], error)

    async def limits(self) -> BankLimits:
        return await self._call(self._handle.limits, timeout_s=READY_S)

    def _near(self, digest: str) -> DeploymentHandle:
        """A handle to the worker that has the adapter, if one has."""
        # Not multiplexed_model_id: Serve would split batches by it, and no batch would ever mix tasks.
        return self._handle.options(session_id=digest)

    async def _call(self, method, *args, timeout_s: float | None = None):
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
        except (
            TimeoutError,
            DeploymentUnavailableError,
            ReplicaUnavailableError,
            ray.exceptions.RayActorError,
        ) as error:
            raise Unavailable("no worker answers; one may still be loading its backbone", retry_after_s=5) from error


@serve.ingress()
class Gateway:
    """Puts `make`'s application in front of the workers."""

    def __init__(self, make: Callable[[Workers], FastAPI], worker: DeploymentHandle) -> None:
        self._make = make
        self._workers = ServeWorkers(worker)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._make(self._workers)
