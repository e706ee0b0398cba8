"""A worker without a cluster, over a real Redis and a real store."""

import asyncio
import gc
import threading
import warnings
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Literal

import pytest

from hub.settings import Settings
from hub.storage.store import Store
from hub.worker.batch_tuner import BatchTuner, Way
from hub.worker.prewarming import Prewarming
from hub.worker.replica import Worker

from .metrics import Recorder


def make_worker(
    redis_url: str, store: Store, home: Path, slots: int = 2, dtype: Literal["float32", "int8"] = "float32"
) -> Worker:
    """Return a worker with the demo backbone."""
    settings = Settings(backbone="demo", slots=slots, batch_wait_ms=50, home=home, dtype=dtype)
    return Worker(settings, store, Prewarming(redis_url, []), lambda: 1, Recorder().types)


def run(use: Callable[[], Awaitable[None]]) -> None:
    """Run a test on an event loop, and end the worker's periodic tasks before the loop closes.

    A task that is cancelled while it connects to Redis leaves a socket open. The garbage collector runs here, otherwise
    its `ResourceWarning` would fail a later test.
    """

    async def run_and_end() -> None:
        try:
            await use()
        finally:
            periodic = asyncio.all_tasks() - {asyncio.current_task()}
            for task in periodic:
                task.cancel()
            if periodic:
                await asyncio.wait(periodic)

    asyncio.run(run_and_end())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


def fix_batch_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the largest batch size, however fast this machine is."""
    monkeypatch.setattr(BatchTuner, "record", lambda *_: None)
    monkeypatch.setattr(BatchTuner, "trials", 0)


class PassGate:
    """Holds forward passes back until `open` is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.started = threading.Event()
        self.open = threading.Event()
        choose = BatchTuner.choose_way

        def choose_when_open(tuner: BatchTuner, images: int, most_parts: int) -> Way:
            self.started.set()
            assert self.open.wait(60)
            return choose(tuner, images, most_parts)

        monkeypatch.setattr(BatchTuner, "choose_way", choose_when_open)
