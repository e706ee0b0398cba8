"""`karst-hub demo`: a whole hub with three tasks, real images through HTTP, and a clean end."""

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
CALLERS = 24  # requests at once: all of them
# The demo is its own hub, whatever the user's environment says of another.
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
    """An image of the demo and what it shows: its file is `samples/<task>/<truth>-<n>.png`."""

    task: str
    path: Path

    @property
    def truth(self) -> str:
        return self.path.stem.rpartition("-")[0]


class Passes:
    """Notes from the replies how many tasks shared a forward pass at most."""

    def __init__(self) -> None:
        self.most_tasks = 0

    def note(self, response: httpx.Response) -> None:
        self.most_tasks = max(self.most_tasks, int(response.headers.get("x-batch-tasks", 0)))


def run(console: Console, settings: Settings) -> None:
    """Start, register, classify, print, stop; `settings` are the environment's with `SETTINGS` over them."""
    with (
        as_file(files("adapters.demo")) as folder,
        tempfile.TemporaryDirectory(prefix="karst-hub-demo-") as home,
    ):
        console.print("starting a hub on this machine (Ray, Redis, one worker) ...")
        with local_hub(settings.model_copy(update={"home": Path(home), "port": free_port()})) as hub:
            assert hub.first_keys.owner is not None  # noqa: S101 (its home is new)
            passes = Passes()
            with Client(hub.url, hub.first_keys.owner, on_response=passes.note) as client:
                for task in TASKS:
                    done = client.register(task, folder / f"{task}.safetensors")
                    console.print(f"registered {task}: {len(done.labels)} labels, {done.size_bytes / 1000:.0f} kB")
                samples = [Sample(t, path) for t in TASKS for path in sorted((folder / "samples" / t).glob("*.png"))]
                with ThreadPoolExecutor(CALLERS) as pool:  # a request an image, many at once
                    answers = list(pool.map(lambda s: client.classify(s.task, [s.path], top_k=1), samples))
            _print(console, samples, answers)
            right = sum(a.predictions[0][0].label == s.truth for s, a in zip(samples, answers, strict=True))
            console.print(f"{right} of {len(samples)} right; up to {passes.most_tasks} tasks shared one forward pass")
            console.print("stopping ...")
    console.print("Next: `make serve` runs a hub of your own; README.md shows the first adapter in five minutes.")


def _print(console: Console, samples: Sequence[Sample], answers: Sequence[Classified]) -> None:
    table = Table("image", "task", "label", "score", "truth")
    for sample, answer in zip(samples, answers, strict=True):
        best = answer.predictions[0][0]
        mark = "" if best.label == sample.truth else "  (wrong)"
        table.add_row(sample.path.name, sample.task, best.label, f"{best.score:.3f}", sample.truth + mark)
    console.print(table)
