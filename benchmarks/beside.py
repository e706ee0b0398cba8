"""Hub with an empty application in the same Ray cluster, which shows the cost of HTTP, proxy and two hops alone.

`hub_beside_empty` runs this file in a process of its own, which ends with the process that started it. The empty
application has the hub's shape. A FastAPI ingress reads the whole body and sends as many bytes of pixels by value to
a worker. Neither computes anything. Ray, its settings and HAProxy are the hub's.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio

from hub.admin_schemas import LimitsChange
from hub.local.embedded_redis import embedded_redis
from hub.local.hub import local_hub
from hub.local.ports import free_port
from hub.registry.audit import OPERATOR
from hub.registry.keys import OWNER, KeyRegistry
from hub.registry.redis.connection import RegistryConnection
from hub.registry.tenants import TenantRegistry
from hub.settings import Settings

ROOT = Path(__file__).parents[1]
NO_LIMITS = LimitsChange(
    requests_per_second=1e6, images_per_second=1e7, images_in_flight=10**6, tasks=10**6, versions=10**5
)
TENANTS = ("first", "second")
EMPTY = "/empty"


@dataclass(frozen=True)
class Hub:
    """Addresses of the hub and the empty application, one owner's key per tenant, and the process above theirs."""

    address: tuple[str, int]
    keys: dict[str, str]
    pid: int

    @property
    def url(self) -> str:
        return "http://{}:{}".format(*self.address)


@contextmanager
def hub_beside_empty(pixels: int, **settings: str) -> Iterator[Hub]:
    """Run both while the context lasts.

    Args:
        pixels: side of the square images that the empty application sends to its worker.
        settings: see `hub_process`.

    Raises:
        RuntimeError: the hub does not start; its process wrote the reason to stderr.
    """
    with hub_process(["-m", "benchmarks.beside", str(pixels)], **settings) as hub:
        yield hub


@contextmanager
def hub_process(command: list[str], *, before: Path | None = None, **settings: str) -> Iterator[Hub]:
    """Run a Python command that calls `run_hub` while the context lasts.

    Args:
        before: checkout of an older commit, whose packages `hub` and `adapters` the command imports.
        settings: `backbone`, `batch_size` and so on. Other settings have their defaults; the environment has no effect.

    Raises:
        RuntimeError: the hub does not start; its process wrote the reason to stderr.
    """
    port = free_port()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HUB_")}
    with tempfile.TemporaryDirectory() as home:
        chosen = settings | {"home": home, "port": str(port)}
        environment |= {f"HUB_{name.upper()}": value for name, value in chosen.items()}
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        if before is not None:  # the benchmarks are this commit's, so their folder has no other packages
            folder = Path(home, "packages")
            folder.mkdir()
            for name, at in ("hub", before), ("adapters", before), ("benchmarks", ROOT), ("tests", ROOT):
                (folder / name).symlink_to((at / name).resolve())
            environment["PYTHONPATH"] = str(folder)
            pipes["cwd"] = folder
        process = subprocess.Popen([sys.executable, *command], env=environment, **pipes)
        with process:  # Closing stdin ends the hub; the context then waits for the process.
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("{"):
                    yield Hub(("127.0.0.1", port), json.loads(line), process.pid)
                    break
            else:
                raise RuntimeError("the hub did not start")


def run_hub(deploy: Callable[[Settings], object]) -> None:
    """Run a hub in this process with settings from the environment, until stdin ends.

    Args:
        deploy: called with the settings when the hub runs.
    """
    settings = Settings()
    with embedded_redis(settings.home) as url:
        keys = anyio.run(_keys, url)
        settings = settings.model_copy(update={"redis_url": url, "store_url": str(settings.home / "store")})
        with local_hub(settings):
            deploy(settings)
            print(json.dumps(keys), flush=True)
            sys.stdin.read()


def main() -> None:
    """Run the hub and the empty application."""
    pixels = int(sys.argv[1])

    def deploy(_settings: Settings) -> None:
        from ray import serve  # Ray reads its settings at import.

        serve.run(empty_application((3, pixels, pixels)), name="empty", route_prefix=EMPTY)

    run_hub(deploy)


async def _keys(url: str) -> dict[str, str]:
    """Return one owner's key per tenant, with limits above every benchmark's load."""
    database = RegistryConnection(url)
    tenants = TenantRegistry(database)
    keys = {}
    for tenant in TENANTS:
        await tenants.create(OPERATOR, tenant, NO_LIMITS)
        keys[tenant] = (await KeyRegistry(database).create(OPERATOR, tenant, OWNER, "benchmark")).key
    await database.close()
    return keys


def empty_application(shape: tuple[int, ...]) -> Any:
    """Build the empty two-hop application. Its classes are local, so Ray sends them to the replicas by value."""
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
