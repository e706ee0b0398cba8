"""Gateways are replaced under load, with Ray's manager of HAProxy, the real HAProxy and uvicorn: no call is lost."""

import asyncio
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from ray.serve._private import haproxy as ray_haproxy

from hub.cluster import ray_compat
from hub.cluster.haproxy_node import install_haproxy
from hub.local.ports import free_port
from hub.settings import Settings
from tests.support.serve import backends, haproxy_api

UPGRADES = 10
CALLERS = 6
BODY = bytes(100_000)
RELOAD_S = 1.5  # how late HAProxy hears that a gateway stops; a busy machine takes longer than Ray's second


class Gateway:
    """A gateway as Ray Serve runs it behind HAProxy, down to the order in which it stops."""

    def __init__(self) -> None:
        self.port = free_port()
        self._draining = False
        config = uvicorn.Config(
            self._answer, port=self.port, interface="asgi3", lifespan="off", log_config=None, timeout_keep_alive=90
        )
        self._server = uvicorn.Server(config)

    async def start(self) -> None:
        self._task = asyncio.create_task(self._server._serve())  # without the signal handlers of `serve`
        while not self._server.started:
            await asyncio.sleep(0.01)

    async def stop(self, draining_s: float) -> None:
        """Fail the health checks, take requests for some seconds, then close the listener and idle connections."""
        self._draining = True
        await asyncio.sleep(draining_s)
        self._server.should_exit = True
        await self._task

    async def _answer(self, scope: Any, receive: Any, send: Any) -> None:
        status = 503 if self._draining and scope["path"] == "/-/healthz" else 200
        while (await receive()).get("more_body"):
            pass
        await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})


class Callers:
    """Threads that send one request after the other on kept-alive connections, without retries."""

    def __init__(self, port: int) -> None:
        self.calls = 0
        self.failures: list[str] = []
        self._url = f"http://127.0.0.1:{port}/v1/tasks/a/classify"
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=self._call) for _ in range(CALLERS)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()

    def _call(self) -> None:
        with httpx.Client(trust_env=False, timeout=30) as client:
            while not self._ended.is_set():
                self.calls += 1
                try:
                    status = client.post(self._url, content=BODY).status_code
                    if status != 200:
                        self.failures.append(f"status {status}")
                except httpx.HTTPError as error:
                    self.failures.append(repr(error))


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Yield a folder with a short path; HAProxy runs as in a hub."""
    folder = Path(tempfile.mkdtemp(prefix="karst-hub-", dir="/tmp"))
    script = install_haproxy(Settings(), None, folder)
    monkeypatch.setattr(ray_haproxy, "RAY_SERVE_HAPROXY_BINARY_PATH", str(script))
    yield folder
    shutil.rmtree(folder)


async def upgraded(folder: Path, upgrades: int, check_interval: str, draining_s: float) -> Callers:
    """Replace two gateways some times, one after the other, and return the callers with their results."""
    port, gateways = free_port(), [Gateway(), Gateway()]
    for gateway in gateways:
        await gateway.start()
    api = haproxy_api(folder, port, [gateway.port for gateway in gateways], check_interval)
    callers = Callers(port)
    await api.start()
    try:
        async with httpx.AsyncClient(trust_env=False) as client, asyncio.timeout(60):
            while (await client.post(f"http://127.0.0.1:{port}/", content=b"")).status_code != 200:
                await asyncio.sleep(0.1)
        callers.start()
        for _ in range(upgrades):
            new = Gateway()
            await new.start()
            old, gateways = gateways[0], [gateways[1], new]
            api.set_backend_configs(backends([old.port, *(gateway.port for gateway in gateways)]))
            await api.reload()
            stopping = asyncio.create_task(old.stop(draining_s))
            await asyncio.sleep(RELOAD_S)
            api.set_backend_configs(backends([gateway.port for gateway in gateways]))
            await api.reload()
            await stopping
    finally:
        await asyncio.to_thread(callers.stop)
        await api.stop()
        with suppress(asyncio.CancelledError):
            await asyncio.gather(*(gateway.stop(0) for gateway in gateways))
    return callers


@pytest.mark.slow
def test_no_call_is_lost_when_gateways_are_replaced_ten_times(folder: Path) -> None:
    callers = asyncio.run(upgraded(folder, UPGRADES, ray_compat.CHECK_INTERVAL, ray_compat.DRAINING_S))
    assert callers.calls > 100 * UPGRADES
    assert callers.failures == []
