"""An ASGI application on a real port, for clients that need one."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import uvicorn
from starlette.types import ASGIApp

STOP_S = 30  # a request that still waits then is cancelled


@contextmanager
def listening(app: ASGIApp, *, has_lifespan: bool = True) -> Iterator[str]:
    """Serve an application on a free port of loopback; yield its URL."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        lifespan: Literal["on", "off"] = "on" if has_lifespan else "off"
        config = uvicorn.Config(
            app, lifespan=lifespan, ws="none", log_level="warning", access_log=False, timeout_graceful_shutdown=STOP_S
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            while not server.started and thread.is_alive():
                time.sleep(0.01)
            assert server.started
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            stopped_s = time.monotonic()
            thread.join()
            assert time.monotonic() - stopped_s < STOP_S, "a request never ended"
