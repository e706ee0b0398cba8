"""Soak test of a hub: random tasks, cold loads, evictions, re-registrations; every answer is checked.

    python -m tests.soak [--seconds 300] [--tasks 60] [--callers 8]

The hub has far fewer slots than tasks and room for few adapters in host memory, so most requests find their adapter
cold. Each answer names its adapter's digest; its scores must be those of that adapter's merged model, alone.
Not a part of `make test`: `make soak`.
"""

import argparse
import random
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import torch

from adapters import Adapter, Backbone, load_backbone
from adapters.data.images import decode_image, eval_transform, normalise
from hub.client.client import Client
from hub.local.hub import local_hub
from hub.local.ports import free_port
from hub.settings import Settings

from .support.models import png, random_adapter

SLOTS = 6
IMAGES = 5
SCORE_TOLERANCE = 1e-4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--tasks", type=int, default=60)
    parser.add_argument("--callers", type=int, default=8)
    options = parser.parse_args()
    print(soak(options.seconds, options.tasks, options.callers))


def soak(seconds: float, tasks: int, callers: int) -> Counter[str]:
    """Run the soak test; return how often each thing happened.

    Raises:
        AssertionError: a wrong answer, an error, or hardly any load.
    """
    world = World(load_backbone("demo"), tasks)
    with tempfile.TemporaryDirectory() as home:
        settings = Settings(
            backbone="demo", home=Path(home), port=free_port(), slots=SLOTS, max_rank=8, max_kernels=4,
            host_cache_bytes=20 * 1024**2 // 8,
        )  # fmt: skip
        with local_hub(settings) as hub:
            assert hub.first_keys.owner is not None
            with Client(hub.url, hub.first_keys.owner) as client:
                for task in range(tasks):
                    world.register(client, task)
            until = time.monotonic() + seconds
            threads = [
                threading.Thread(target=world.call, args=(hub.url, hub.first_keys.owner, seed, until))
                for seed in range(callers)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    if world.failures:
        raise AssertionError(f"{len(world.failures)} failures, the first: {world.failures[0]}; {dict(world.counts)}")
    # A worker on a machine that is as fast with single images takes no larger batches.
    assert world.counts["mixed"] > 0 or not world.counts["shared"], "no pass had two tasks"
    assert world.counts["cold"] > tasks, "hardly any adapter was cold"
    return world.counts


@dataclass
class World:
    """The registered adapters, their right scores, and the counts of results."""

    backbone: Backbone
    tasks: int
    adapters: dict[str, Adapter] = field(default_factory=dict)  # by digest
    counts: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    _right: dict[tuple[str, int], dict[str, float]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _seed: int = 0

    def register(self, client: Client, task: int) -> None:
        with self._lock:  # torch's seeds are global
            self._seed += 1
            adapter = random_adapter(
                self.backbone, seed=self._seed, kernels=1 + self._seed % 4, rank=1 + self._seed % 8,
                classes=2 + self._seed % 7, rescale=("none", "scalar", "channel")[self._seed % 3],
                norms=self._seed % 5 == 0,
            )  # fmt: skip
            self.adapters[adapter.digest] = adapter
        client.register(f"task-{task}", adapter.data, labels_may_change=True)

    def call(self, url: str, key: str, seed: int, until: float) -> None:
        """Send requests as one caller until the time `until`."""
        rng = random.Random(seed)

        def count(response: httpx.Response) -> None:
            with self._lock:
                self.counts["shared"] += int(response.headers.get("x-batch-images", "0")) > 1
                self.counts["mixed"] += int(response.headers.get("x-batch-tasks", "0")) > 1
                self.counts["cold"] += any(
                    part.startswith("load;dur=") and float(part[9:]) > 1
                    for part in response.headers.get("server-timing", "").split(", ")
                )

        with Client(url, key, on_response=count) as client:
            while time.monotonic() < until and len(self.failures) < 10:
                try:
                    if rng.random() < 0.02:
                        self.register(client, rng.randrange(self.tasks))
                        self._count("registered")
                    else:
                        self._classify(client, rng)
                except Exception as error:
                    self.failures.append(f"{type(error).__name__}: {error}")

    def _classify(self, client: Client, rng: random.Random) -> None:
        images = [rng.randrange(IMAGES) for _ in range(rng.choice((1, 1, 1, 2, 5)))]
        answer = client.classify(f"task-{rng.randrange(self.tasks)}", [png(i) for i in images], top_k=100)
        for image, predictions in zip(images, answer.predictions, strict=True):
            right = self._scores(answer.digest, image)
            found = {p.label: p.score for p in predictions}
            if found.keys() != right.keys() or any(abs(found[k] - right[k]) > SCORE_TOLERANCE for k in right):
                self.failures.append(f"{answer.task} ({answer.digest[:8]}), image {image}: {found} is not {right}")
        self._count("images", len(images))

    def _scores(self, digest: str, image: int) -> dict[str, float]:
        """Return label -> score of the merged model for one image."""
        with self._lock:
            if (digest, image) not in self._right:
                adapter = self.adapters[digest]
                merged = adapter.merge(self.backbone)
                mean, std = (torch.tensor(adapter.preprocess[name]) for name in ("mean", "std"))
                for i in range(IMAGES):
                    pixels = eval_transform(adapter.preprocess)(decode_image(png(i)))[None]
                    with torch.inference_mode():
                        scores = merged(normalise(pixels, mean, std))[0].softmax(0)
                    self._right[digest, i] = dict(zip(adapter.labels, scores.tolist(), strict=True))
            return self._right[digest, image]

    def _count(self, what: str, times: int = 1) -> None:
        with self._lock:
            self.counts[what] += times


if __name__ == "__main__":
    main()
