"""A worker without a cluster, over a real Redis and a real store."""

import threading
from pathlib import Path

import pytest

from hub.settings import Settings
from hub.storage.store import Store
from hub.worker.batch_tuner import BatchTuner
from hub.worker.prewarming import Prewarming
from hub.worker.replica import Worker

from .metrics import Recorder


def make_worker(redis_url: str, store: Store, home: Path) -> Worker:
    """Return a worker with the demo backbone and two slots."""
    settings = Settings(backbone="demo", slots=2, batch_wait_ms=50, home=home)
    return Worker(settings, store, Prewarming(redis_url, []), lambda: 1, Recorder().types)


def fix_batch_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the largest batch size, however fast this machine is."""
    monkeypatch.setattr(BatchTuner, "record", lambda *_: None)
    monkeypatch.setattr("hub.worker.replica.TRIALS_PER_SIZE", 0)


class PassGate:
    """Holds forward passes back until `open` is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.started = threading.Event()
        self.open = threading.Event()
        choose = BatchTuner.choose_threads

        def choose_when_open(tuner: BatchTuner, images: int) -> int:
            self.started.set()
            assert self.open.wait(60)
            return choose(tuner, images)

        monkeypatch.setattr(BatchTuner, "choose_threads", choose_when_open)
