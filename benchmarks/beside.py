"""A hub, and beside it in the same Ray cluster an empty application: what HTTP, proxy and two hops cost by themselves.

`hub_beside_empty` runs this file as a process of its own, which ends with whoever started it. The empty application
has the hub's shape: a FastAPI ingress that reads the whole body, and behind its handle a worker that is sent as many
bytes of pixels by value; neither does anything. Ray, its switches and HAProxy are the hub's.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import anyio

from hub.local.embedded_redis import embedded_redis
from hub.local.hub import local_hub
from hub.local.ports import free_port
from hub.registry.audit import OPERATOR
from hub.registry.connection import RegistryConnection
from hub.registry.keys import OWNER, KeyRegistry
from hub.registry.tenants import TenantRegistry
from hub.schemas import LimitsChange
from hub.settings import Settings

NO_LIMITS = LimitsChange(
    requests_per_second=1e6, images_per_second=1e7, images_in_flight=10**6, tasks=10**6, versions=10**5
)
TENANTS = ("first", "second")
EMPTY = "/empty"


@dataclass(frozen=True)
class Hub:
    """Where it listens, and an owner's key of each tenant."""

    address: tuple[str, int]
    keys: dict[str, str]

    @property
    def url(self) -> str:
        return "http://{}:{}".format(*self.address)


@contextmanager
def hub_beside_empty(pixels: int, **settings: str) -> Iterator[Hub]:
    """Run both for as long as the context lasts.

    Args:
        pixels: the side of the square images that the empty application sends to its worker.
        settings: `backbone`, `batch_size` and so on; all others have their defaults, whatever the environment says.

    Raises:
        RuntimeError: the hub does not start; its process has said why on stderr.
    """
    port = free_port()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HUB_")}
    with tempfile.TemporaryDirectory() as home:
        chosen = settings | {"home": home, "port": str(port)}
        environment |= {f"HUB_{name.upper()}": value for name, value in chosen.items()}
        command = [sys.executable, "-m", "benchmarks.beside", str(pixels)]
        process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        with process:  # at its end stdin is closed, which ends the hub; then the process is waited for
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("{"):
                    yield Hub(("127.0.0.1", port), json.loads(line))
                    break
            else:
                raise RuntimeError("the hub did not start")


def main() -> None:
    """In the process: settings from the environment; runs until stdin ends."""
    pixels = int(sys.argv[1])
    settings = Settings()
    with embedded_redis(settings.home) as url:
        keys = anyio.run(_keys, url)
        settings = settings.model_copy(update={"redis_url": url})
        with local_hub(settings):
            from ray import serve  # reads its switches now

            serve.run(empty_application((3, pixels, pixels)), name="empty", route_prefix=EMPTY)
            print(json.dumps(keys), flush=True)
            sys.stdin.read()


async def _keys(url: str) -> dict[str, str]:
    """An owner's key of each tenant; their limits are above all that a benchmark asks for."""
    database = RegistryConnection(url)
    tenants = TenantRegistry(database)
    keys = {}
    for tenant in TENANTS:
        await tenants.create(OPERATOR, tenant, NO_LIMITS)
        keys[tenant] = (await KeyRegistry(database).create(OPERATOR, tenant, OWNER, "benchmark")).key
    await database.close()
    return keys


def empty_application(shape: tuple[int, ...]) -> Any:
    """The empty two-hop application; its classes are local, so that they travel to the replicas by value."""
    import numpy as np
    from fastapi import FastAPI, Request
    from ray import serve
    from ray.serve.handle import DeploymentHandle

    from hub.cluster.app import GATEWAY_REQUESTS, QUEUED_REQUESTS, WORKER_REQUESTS

    class EmptyWorker:
        async def classify(self, tenant: str, digest: str, images: list[np.ndarray]) -> int:
            return len(images)

    @serve.ingress()
    class EmptyGateway:
        def __init__(self, worker: DeploymentHandle) -> None:
            self._worker = worker

        def __serve_build_asgi_app__(self) -> FastAPI:
            api = FastAPI()
            image = np.zeros(shape, np.uint8)

            @api.post("/")
            async def call(request: Request) -> dict[str, int]:
                await request.body()
                return {"images": await self._worker.classify.remote("tenant", "0" * 64, [image])}

            return api

    worker = serve.deployment(
        name="worker",
        max_ongoing_requests=WORKER_REQUESTS,
        max_queued_requests=QUEUED_REQUESTS,
        ray_actor_options={"num_cpus": 0},
    )(EmptyWorker)
    gateway = serve.deployment(
        name="gateway", max_ongoing_requests=GATEWAY_REQUESTS, ray_actor_options={"num_cpus": 0}
    )(EmptyGateway)
    return gateway.bind(worker.bind())


if __name__ == "__main__":
    main()
