"""Decodes of small images in a thread pool: a job of a thread decodes all images that wait for it.

The way of an image to a thread and back costs about as much as the decode of a small one. The results of a job come
back together, so the calls that waited together also leave together to their worker.
"""

import asyncio
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from contextvars import Context
from dataclasses import dataclass
from math import inf
from typing import Generic, TypeVar

from ...errors import InvalidImage

T = TypeVar("T")
JOB_S = 0.005  # then a job begins no further image: other tenants wait for its thread


def too_slow(field: str, timeout_s: float) -> InvalidImage:
    """Return the error of an image whose decode takes too long."""
    return InvalidImage.at(field, f"the image took more than {timeout_s:g} s to decode; save it in a simpler form")


class Group:
    """The images of one call. No job begins an image behind one that has failed."""

    def __init__(self) -> None:
        self._size = 0
        self._failed_at = inf

    def next_number(self) -> int:
        """Return the number of a further image."""
        self._size += 1
        return self._size

    def fail(self, number: int) -> None:
        """Note that an image has failed. Two threads at once may note the larger number, which is a failed one too."""
        self._failed_at = min(self._failed_at, number)

    def is_behind_failed(self, number: int) -> bool:
        """Return whether an earlier image has failed."""
        return number > self._failed_at


@dataclass(eq=False)
class _Image(Generic[T]):
    field: str
    decode: Callable[[], T]
    group: Group
    number: int  # in the group
    result: "asyncio.Future[T]"


class _Job(Generic[T]):
    """One run of a thread."""

    def __init__(self, waiting: "deque[_Image[T]]") -> None:
        """
        Args:
            waiting: images of one tenant; other jobs take from it too.
        """
        self._waiting = waiting
        self._current: _Image[T] | None = None  # begun last
        self._ended: deque[tuple[_Image[T], T | BaseException]] = deque()

    def run(self) -> None:
        """Decode images for `JOB_S`, at least one; called in a thread."""
        until_s = time.monotonic() + JOB_S
        while True:
            try:
                self._current = image = self._waiting.popleft()
            except IndexError:  # other jobs took the rest
                return
            if image.result.cancelled() or image.group.is_behind_failed(image.number):
                continue
            try:
                self._ended.append((image, image.decode()))
            except BaseException as error:  # otherwise a library's panic would leave its call without an answer
                image.group.fail(image.number)
                self._ended.append((image, error))
            if time.monotonic() > until_s:
                return

    def give(self) -> None:
        """Give the results so far to the calls that wait for them."""
        while self._ended:
            image, result = self._ended.popleft()
            if image.result.done():
                continue
            if isinstance(result, BaseException):
                image.result.set_exception(result)
            else:
                image.result.set_result(result)

    def fail(self, timeout_s: float) -> None:
        """Fail the image that the thread still decodes."""
        image = self._current
        if image is not None and not image.result.done():
            image.result.set_exception(too_slow(image.field, timeout_s))


class DecodeJobs(Generic[T]):
    """Images that wait for a thread, by tenant, and the jobs that decode them."""

    def __init__(
        self,
        start: Callable[[str, Callable[[], None]], "Awaitable[asyncio.Future[None]]"],
        *,
        tenant_jobs: int,
        timeout_s: float,
    ) -> None:
        """
        Args:
            start: starts a function in a thread when it is the tenant's turn, and returns its future. It also limits
                the threads of a tenant.
            tenant_jobs: jobs of one tenant that begin images at the same time.
            timeout_s: time limit of one decode. Python cannot stop it, so further jobs take the images behind it.
        """
        self._start = start
        self._tenant_jobs = tenant_jobs
        self._timeout_s = timeout_s
        self._waiting: dict[str, deque[_Image[T]]] = {}
        self._open: Counter[str] = Counter()  # jobs that begin further images, by tenant
        self._tasks: set[asyncio.Task[None]] = set()  # otherwise a task could be garbage-collected

    def add(self, tenant: str, group: Group, field: str, decode: Callable[[], T]) -> "asyncio.Future[T]":
        """Let a job decode an image; return its result, whose cancellation removes a waiting image.

        Args:
            group: of the call, whose images begin in the order of these calls.
            field: name of the image's field, for errors.
            decode: returns the result, in a thread.
        """
        image = _Image(field, decode, group, group.next_number(), asyncio.get_running_loop().create_future())
        waiting = self._waiting.setdefault(tenant, deque())
        waiting.append(image)

        def leave(result: "asyncio.Future[T]") -> None:
            if result.cancelled():
                with suppress(ValueError):  # a job has taken it
                    waiting.remove(image)

        image.result.add_done_callback(leave)
        self._open_jobs(tenant)
        return image.result

    def _open_jobs(self, tenant: str) -> None:
        """Start as many jobs as images wait, up to the tenant's share."""
        waiting = self._waiting[tenant]
        while self._open[tenant] < min(len(waiting), self._tenant_jobs):
            self._open[tenant] += 1
            task = asyncio.get_running_loop().create_task(self._run(tenant, waiting), context=Context())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        if not waiting and not self._open[tenant]:
            del self._waiting[tenant], self._open[tenant]

    async def _run(self, tenant: str, waiting: "deque[_Image[T]]") -> None:
        """Run one job. Once it begins no further image, other jobs take those that wait."""
        job = _Job(waiting)
        run = None
        try:
            run = await self._start(tenant, job.run)
            run.add_done_callback(lambda _: job.give())
            await asyncio.wait((run,), timeout=JOB_S)
            job.give()  # otherwise a slow image would delay the answers of others
        except Exception as error:  # the gateway stops
            while waiting:
                image = waiting.popleft()
                if not image.result.done():
                    image.result.set_exception(error)
        self._open[tenant] -= 1
        self._open_jobs(tenant)
        if run is not None:
            await asyncio.wait((run,), timeout=self._timeout_s)
            if not run.done():
                job.fail(self._timeout_s)
