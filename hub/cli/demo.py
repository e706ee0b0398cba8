"""`karst-hub demo`: start a hub, register three tasks, classify real images over HTTP, stop the hub."""

import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from ..client.client import Client
from ..local.hub import local_hub
from ..local.ports import free_port
from ..schemas import Classified
from ..settings import Settings

TASKS = ("digits", "shapes", "count")
THREADS = 24  # one per sample image: all requests are concurrent
# The demo starts its own hub. Otherwise the user's HUB_* variables would connect it to another hub.
SETTINGS: dict[str, Any] = {
    "backbone": "demo",
    "checkpoint": None,
    "redis_url": None,
    "store_url": None,
    "host": "127.0.0.1",
    "batch_wait_ms": 20,
}


@dataclass(frozen=True)
class Sample:
    """A sample image with its true label. Its file is `samples/<task>/<label>-<n>.png`."""

    task: str
    path: Path

    @property
    def true_label(self) -> str:
        return self.path.stem.rpartition("-")[0]


class BatchObserver:
    """Largest number of tasks in one forward pass, from the header `X-Batch-Tasks` of the replies."""

    def __init__(self) -> None:
        self.max_tasks = 0

    def observe(self, response: httpx.Response) -> None:
        """Read the header of a response."""
        self.max_tasks = max(self.max_tasks, int(response.headers.get("x-batch-tasks", 0)))


def run(console: Console, settings: Settings) -> None:
    """Start a hub, register the tasks, classify the samples, print the results, stop the hub.

    Args:
        settings: the settings of the environment, overridden by `SETTINGS`.
    """
    with (
        as_file(files("adapters.demo")) as folder,
        tempfile.TemporaryDirectory(prefix="karst-hub-demo-") as home,
    ):
        console.print("starting a hub on this machine (Ray, Redis, one worker) ...")
        with local_hub(settings.model_copy(update={"home": Path(home), "port": free_port()})) as hub:
            assert hub.first_keys.owner is not None  # noqa: S101 (a new registry has no keys)
            batches = BatchObserver()
            with Client(hub.url, hub.first_keys.owner, on_response=batches.observe) as client:
                for task in TASKS:
                    registered = client.register(task, folder / f"{task}.safetensors")
                    console.print(
                        f"registered {task}: {len(registered.labels)} labels, {registered.size_bytes / 1000:.0f} kB"
                    )
                samples = [Sample(t, path) for t in TASKS for path in sorted((folder / "samples" / t).glob("*.png"))]
                with ThreadPoolExecutor(THREADS) as pool:  # one request per image, all concurrent
                    replies = list(pool.map(lambda s: client.classify(s.task, [s.path], top_k=1), samples))
            _print(console, samples, replies)
            correct = sum(r.predictions[0][0].label == s.true_label for s, r in zip(samples, replies, strict=True))
            console.print(
                f"{correct} of {len(samples)} correct; up to {batches.max_tasks} tasks shared one forward pass"
            )
            console.print("stopping ...")
    console.print(
        "Next: `make serve` runs your own hub; README.md shows how to train your first adapter in five minutes."
    )


def _print(console: Console, samples: Sequence[Sample], replies: Sequence[Classified]) -> None:
    table = Table("image", "task", "label", "score", "true label")
    for sample, reply in zip(samples, replies, strict=True):
        best = reply.predictions[0][0]
        mark = "" if best.label == sample.true_label else "  (wrong)"
        table.add_row(sample.path.name, sample.task, best.label, f"{best.score:.3f}", sample.true_label + mark)
    console.print(table)
