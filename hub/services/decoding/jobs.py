"""Decodes of small images in a thread pool: a job of a thread decodes all images that wait for it.

The way of an image to a thread and back costs about as much as the decode of a small one. The results of a job come
back together, so the calls that waited together also leave together to their worker.
"""

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from contextvars import Context
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from ...errors import InvalidImage

T = TypeVar("T")
JOB_S = 0.005  # then a job begins no further image, since other tenants wait for its thread


def too_slow(field: str, timeout_s: float) -> InvalidImage:
    """Return the error of an image whose decode takes too long."""
    return InvalidImage.at(field, f"the image took more than {timeout_s:g} s to decode; save it in a simpler form")


@dataclass(eq=False)
class Group:
    """The images of one call. Once one of them has failed, no job begins another."""

    has_failed: bool = False


@dataclass(eq=False)
class _Image(Generic[T]):
    field: str
    decode: Callable[[], T]
    group: Group
    result: "asyncio.Future[T]"


@dataclass(eq=False)
class _Job(Generic[T]):
    """One run of a thread.

    Attributes:
        waiting: images of one tenant; other jobs take from it too.
        current: image that the thread has begun last.
        ended: images with their results or errors.
    """

    waiting: "deque[_Image[T]]"
    current: "_Image[T] | None" = None
    ended: "list[tuple[_Image[T], T | Exception]]" = field(default_factory=list)

    def run(self) -> None:
        """Decode images; called in a thread."""
        until_s = time.monotonic() + JOB_S
        while time.monotonic() < until_s:
            try:
                self.current = image = self.waiting.popleft()
            except IndexError:  # other jobs took the rest
                return
            if image.result.cancelled() or image.group.has_failed:
                continue
            try:
                self.ended.append((image, image.decode()))
            except Exception as error:
                image.group.has_failed = True
                self.ended.append((image, error))

    def give(self) -> None:
        """Give the results so far to the calls that wait for them."""
        for image, result in self.ended:
            if image.result.done():
                continue
            if isinstance(result, Exception):
                image.result.set_exception(result)
            else:
                image.result.set_result(result)


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
            start: starts a function in a thread when it is the tenant's turn, and returns its future.
            tenant_jobs: jobs of one tenant that run at the same time.
            timeout_s: time limit of one decode. Python cannot stop it, so further jobs take the images behind it.
        """
        self._start = start
        self._tenant_jobs = tenant_jobs
        self._timeout_s = timeout_s
        self._waiting: dict[str, deque[_Image[T]]] = {}
        self._jobs: dict[str, set[asyncio.Task[None]]] = {}

    def add(self, tenant: str, group: Group, field: str, decode: Callable[[], T]) -> "asyncio.Future[T]":
        """Let a job decode an image, in order; return its result, whose cancellation removes a waiting image.

        Args:
            group: of the call.
            field: name of the image's field, for errors.
            decode: returns the result, in a thread.
        """
        loop = asyncio.get_running_loop()
        image = _Image(field, decode, group, loop.create_future())
        waiting = self._waiting.setdefault(tenant, deque())
        waiting.append(image)

        def leave(result: "asyncio.Future[T]") -> None:
            if result.cancelled():
                with suppress(ValueError):  # a job has taken it
                    waiting.remove(image)

        image.result.add_done_callback(leave)
        jobs = self._jobs.setdefault(tenant, set())
        if len(jobs) < min(len(waiting), self._tenant_jobs):
            jobs.add(loop.create_task(self._run(tenant, waiting), context=Context()))
        return image.result

    async def _run(self, tenant: str, waiting: "deque[_Image[T]]") -> None:
        """Run jobs, one after another, until no image of the tenant waits."""
        try:
            while waiting:
                job = _Job(waiting)
                run = await self._start(tenant, job.run)
                await asyncio.wait((run,), timeout=self._timeout_s)
                job.give()
                if not run.done() and job.current is not None and not job.current.result.done():
                    job.current.result.set_exception(too_slow(job.current.field, self._timeout_s))
        except Exception as error:  # the gateway stops
            for image in waiting:
                if not image.result.done():
                    image.result.set_exception(error)
            waiting.clear()
        finally:
            jobs = self._jobs[tenant]
            jobs.discard(asyncio.current_task())
            if not jobs:
                del self._jobs[tenant], self._waiting[tenant]
