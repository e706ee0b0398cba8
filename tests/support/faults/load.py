"""Callers that continue during a fault, and their results. Every answer is checked against the right one."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
import torch

from adapters import Adapter, Backbone
from adapters.data.images import decode_image, eval_transform, normalise
from hub.client.client import Client
from hub.errors import HubError
from hub.local.ports import free_port
from tests.support.hub_process import command, descendants
from tests.support.models import png, random_adapter, wait_until

IMAGES = 6
CLASSES = 4
CLEAR = 1e-3  # by how much the best score must be above the next, so that the right label is beyond doubt
STORE = Path(__file__).with_name("store.py")
REDIS = Path(sys.executable).parent / "redis-server"


class Tasks:
    """Tasks with random adapters, and the right label of each of some images with each."""

    def __init__(self, backbone: Backbone, count: int, prefix: str = "task", seed: int = 0) -> None:
        self._backbone = backbone
        self.adapters: dict[str, Adapter] = {}
        self.right: dict[tuple[str, int], str] = {}
        for i in range(count):
            name = f"{prefix}-{i}"
            labels = [f"{name} {k}" for k in range(CLASSES)]
            self.adapters[name] = random_adapter(backbone, seed + i, CLASSES, labels, kernels=2, rank=4)
            self.right |= self._labels(name)

    def register(self, client: Client) -> None:
        for name, adapter in self.adapters.items():
            client.register(name, adapter.data)

    def cases(self, names: Sequence[str] | None = None) -> list[tuple[str, int]]:
        """(task, image) of all tasks, or of these."""
        return [case for case in self.right if names is None or case[0] in names]

    def _labels(self, name: str) -> dict[tuple[str, int], str]:
        """By the merged model, one image at a time: nothing of the hub's."""
        adapter = self.adapters[name]
        merged = adapter.merge(self._backbone)
        mean, std = (torch.tensor(adapter.preprocess[key]) for key in ("mean", "std"))
        labels = {}
        for image in range(IMAGES):
            pixels = eval_transform(adapter.preprocess)(decode_image(png(image)))[None]
            with torch.inference_mode():
                scores = merged(normalise(pixels, mean, std))[0].softmax(0)
            best = scores.topk(2)
            if best.values[0] - best.values[1] > CLEAR:
                labels[name, image] = adapter.labels[int(best.indices[0])]
        return labels


@dataclass
class Report:
    """The effect of a fault on the calls that began, or ended, after it."""

    asked: int
    failed: dict[str, int]  # kind -> how often
    wrong: int
    failing_s: float  # from the fault to the end of the last call that failed; 0: none did
    pause_s: float  # the longest time in which no call at all was answered
    slowest_s: float  # the slowest answer
    capacity_s: float | None = None  # from the fault until as many workers answer as before
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Call:
    began: float
    ended: float
    kind: str  # "" if it was answered
    detail: str
    worker: str


class Load:
    """Callers in threads, from `with` to its end; each sends one image when it has its last answer."""

    def __init__(
        self,
        url: str | Sequence[str],
        key: str,
        tasks: Tasks,
        *,
        callers: int = 4,
        retry_s: float = 0.0,
        names: Sequence[str] | None = None,
        timeout_s: float = 60.0,
    ) -> None:
        """
        Args:
            url: where the hub is; of several each caller keeps to one.
            retry_s: how long a client tries again; 0: every failure counts.
            names: only these tasks.
        """
        self._urls = [url] if isinstance(url, str) else list(url)
        self._key, self._tasks, self._retry_s, self._timeout_s = key, tasks, retry_s, timeout_s
        self._cases = tasks.cases(names)
        self._callers = callers
        self._calls: list[_Call] = []
        self.wrong: list[str] = []
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(callers)
        self._jobs: list[Any] = []

    def __enter__(self) -> "Load":
        self._jobs = [self._pool.submit(self._call, seed) for seed in range(self._callers)]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop.set()
        self._pool.shutdown()
        if error is None:
            for job in self._jobs:
                job.result()

    def wait_for(self, answers: int, timeout_s: float = 60) -> None:
        """Wait until this many more calls were answered."""
        more = self._answered() + answers
        wait_until(lambda: self._answered() >= more, timeout_s, f"{answers} answers")

    def workers(self, since: float = 0.0) -> set[str]:
        """Return the workers that answered calls that began after a time."""
        return {call.worker for call in list(self._calls) if call.began >= since and call.worker}

    def failures(self) -> list[str]:
        return [f"{call.kind}: {call.detail}" for call in list(self._calls) if call.kind]

    def wait_for_capacity(self, at: float, before: set[str], timeout_s: float = 120) -> float:
        """Seconds from the fault at `at` until a worker answers that was not there before it."""
        wait_until(lambda: bool(self.workers(at) - before), timeout_s, "a new worker")
        first = min(c.ended for c in list(self._calls) if c.began >= at and c.worker and c.worker not in before)
        return round(first - at, 2)

    def report(self, at: float) -> Report:
        """Since the fault at `at`, of `time.monotonic()`."""
        calls = [call for call in list(self._calls) if call.ended >= at]
        failed = [call for call in calls if call.kind]
        answered = sorted(call.ended for call in calls if not call.kind)
        times = [at, *answered]
        return Report(
            asked=len(calls),
            failed=dict(Counter(call.kind for call in failed)),
            wrong=len(self.wrong),
            failing_s=round(max((call.ended - at for call in failed), default=0.0), 2),
            pause_s=round(max((b - a for a, b in pairwise(times)), default=0.0), 2),
            slowest_s=round(max((call.ended - call.began for call in calls if not call.kind), default=0.0), 2),
        )

    def _answered(self) -> int:
        return sum(not call.kind for call in list(self._calls))

    def _call(self, seed: int) -> None:
        rng = random.Random(seed)
        worker = ""

        def note(response: httpx.Response) -> None:
            nonlocal worker
            worker = response.headers.get("x-worker", "")

        url = self._urls[seed % len(self._urls)]
        with Client(url, self._key, retry_s=self._retry_s, on_response=note, timeout_s=self._timeout_s) as client:
            while not self._stop.is_set():
                task, image = rng.choice(self._cases)
                began, kind, detail, worker = time.monotonic(), "", "", ""
                try:
                    answer = client.classify(task, [png(image)], top_k=1)
                    found = answer.predictions[0][0].label
                    right = self._tasks.right[task, image], self._tasks.adapters[task].digest
                    if (found, answer.digest) != right:
                        self.wrong.append(f"{task}, image {image}: {found} of {answer.digest[:8]} is not {right}")
                except HubError as error:
                    cause = error.__cause__
                    kind = type(cause if isinstance(cause, httpx.HTTPError) else error).__name__
                    detail = error.detail
                self._calls.append(_Call(began, time.monotonic(), kind, detail, worker))
                if kind:
                    self._stop.wait(0.05)  # a hub that refuses at once is not stormed


class RedisServer:
    """A redis-server of the test's own, with its append-only file, that may be stopped and killed."""

    def __init__(self, folder: Path, port: int = 0) -> None:
        """On a socket in the folder, and on a port of loopback unless that is 0."""
        self._folder, self._port = folder, port
        self.url = f"unix://{folder / 'redis.sock'}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        folder = str(self._folder)
        command = [
            str(REDIS), "--bind", "127.0.0.1", "--port", str(self._port), "--unixsocket", f"{folder}/redis.sock",
            "--dir", folder,
            "--appendonly", "yes", "--appendfsync", "always", "--save", "", "--logfile", f"{folder}/redis.log",
        ]  # fmt: skip
        self.process = subprocess.Popen(command)

    def send(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)
        if number in (signal.SIGKILL, signal.SIGTERM):
            self.process.wait(30)

    def end(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
            self.process.wait(30)


class StoreServer:
    """The adapter store as a web server of its own, which can be slow, damaged or away."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._port = free_port()
        self.url = f"http://127.0.0.1:{self._port}/store"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._process = subprocess.Popen([sys.executable, str(STORE), str(self._folder), str(self._port)])
        wait_until(self._answers, 30, "the store")

    def behave(self, how: str) -> None:
        """`well`, `slowly SECONDS`, or `corrupt`."""
        part = self._folder / "how.part"
        part.write_text(how)
        os.replace(part, self._folder / "how")

    def end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait(30)

    def _answers(self) -> bool:
        try:
            return httpx.get(self.url).status_code == 404
        except httpx.TransportError:
            return False


def replicas(pid: int, deployment: str) -> list[int]:
    """Processes under this one that are replicas of a deployment: `worker` or `gateway`."""
    return [child for child in descendants(pid) if f"ServeReplica:karst-hub:{deployment}" in command(child)]
