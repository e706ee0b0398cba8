"""Rates of one worker between two status reports, and its counts."""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from ..admin_schemas import TaskRate

MAX_REPORTED_TASKS = 20
MAX_COUNTED_TASKS = 1000  # per interval; images of further tasks are not counted by task, otherwise memory could grow


class Rates(NamedTuple):
    """Rates over one interval."""

    images_per_second: float
    images_per_pass: float
    adapters_per_pass: float
    tasks: list[TaskRate]  # the busiest tasks, the busiest first


@dataclass
class CacheCounts:
    """Events of an adapter cache since the worker started."""

    hits: int = 0
    loads: int = 0
    load_s: float = 0.0
    evictions: int = 0
    failures: int = 0


class WorkerStats:
    """Counts of forward passes, images and tasks in the current interval."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """
        Args:
            clock: seconds.
        """
        self._clock = clock
        self._reset()

    def _reset(self) -> None:
        self._since_s = self._clock()
        self._passes = self._images = self._adapters = 0
        self._by_task: Counter[tuple[str, str]] = Counter()

    def record_pass(self, images: int, adapters: int) -> None:
        """Count a forward pass."""
        self._passes += 1
        self._images += images
        self._adapters += adapters

    def record_call(self, tenant: str, task: str, images: int) -> None:
        """Count the images of a call.

        Args:
            task: the name that the tenant uses.
        """
        key = tenant, task
        if key in self._by_task or len(self._by_task) < MAX_COUNTED_TASKS:
            self._by_task[key] += images

    def next_interval(self) -> Rates:
        """Return the rates of the current interval, and start the next one."""
        seconds = max(1e-3, self._clock() - self._since_s)
        passes = max(1, self._passes)
        rates = Rates(
            images_per_second=self._images / seconds,
            images_per_pass=self._images / passes,
            adapters_per_pass=self._adapters / passes,
            tasks=[
                TaskRate(tenant=tenant, task=task, images_per_second=images / seconds)
                for (tenant, task), images in self._by_task.most_common(MAX_REPORTED_TASKS)
            ],
        )
        self._reset()
        return rates
