"""Jobs of small images: a thread decodes all that wait; errors, cancellations and timeouts belong to one image."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

import pytest

from hub.concurrency import TenantConcurrencyLimit
from hub.errors import InvalidImage
from hub.services.decoding.jobs import JOB_S, DecodeJobs, Group
from tests.support.event_loop import run, until


class Threads:
    """Pool with a share for each tenant, which counts the runs it started, and the images that wait at a gate."""

    def __init__(self) -> None:
        self.executor = ThreadPoolExecutor(8)
        self.share = TenantConcurrencyLimit(1)
        self.started: list[str] = []
        self.gate = threading.Event()
        self.at_gate = 0

    def jobs(self, *, share: int, tenant_jobs: int, timeout_s: float) -> DecodeJobs[int]:
        """Return jobs whose tenants have `share` threads each."""
        self.share = TenantConcurrencyLimit(share)
        return DecodeJobs(self.start, tenant_jobs=tenant_jobs, timeout_s=timeout_s)

    async def start(self, tenant: str, work: Callable[[], None]) -> "asyncio.Future[None]":
        release = await self.share.hold(tenant)
        self.started.append(tenant)
        run = asyncio.get_running_loop().run_in_executor(self.executor, work)
        run.add_done_callback(lambda _: release())
        return run

    def wait(self) -> int:
        """Decode an image that takes until the gate opens."""
        self.at_gate += 1
        self.gate.wait(10)
        return -1


@pytest.fixture
def threads() -> Iterator[Threads]:
    found = Threads()
    yield found
    found.gate.set()
    found.executor.shutdown()


def noted(decoded: list[str], name: str) -> Callable[[], int]:
    """Return a decode that notes its image's name."""

    def decode() -> int:
        decoded.append(name)
        return 1

    return decode


@asynccontextmanager
async def busy(threads: Threads, tenant_jobs: int = 1) -> AsyncIterator[DecodeJobs[int]]:
    """Jobs of a tenant `a`, all of whose threads wait at the gate."""
    jobs = threads.jobs(share=tenant_jobs, tenant_jobs=tenant_jobs, timeout_s=5)
    first = [jobs.add("a", Group(), "first", threads.wait) for _ in range(tenant_jobs)]
    await until(lambda: threads.at_gate == tenant_jobs)
    await asyncio.sleep(JOB_S)  # so these jobs begin no further image
    yield jobs
    threads.gate.set()
    await asyncio.gather(*first, return_exceptions=True)


def test_one_job_decodes_all_images_that_wait_and_gives_their_results_in_order(
    threads: Threads, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def use() -> None:
        async with busy(threads) as jobs:
            monkeypatch.setattr("hub.services.decoding.jobs.JOB_S", 60.0)  # however slow the machine is
            found = [jobs.add("a", Group(), "body", lambda i=i: i) for i in range(50)]  # type: ignore[misc]
            threads.gate.set()
            assert await asyncio.gather(*found) == [*range(50)]
        assert len(threads.started) == 2

    run(use)


def test_job_begins_no_image_after_its_time(threads: Threads) -> None:
    def slow() -> int:
        time.sleep(1.2 * JOB_S)
        return 1

    async def use() -> None:
        async with busy(threads) as jobs:
            found = [jobs.add("a", Group(), "body", slow) for _ in range(4)]
            threads.gate.set()
            await asyncio.gather(*found)
        assert len(threads.started) >= 1 + 4  # between them another tenant gets its turn

    run(use)


def test_tenant_has_as_many_jobs_as_waiting_images_up_to_its_share(threads: Threads) -> None:
    async def use() -> None:
        async with busy(threads, tenant_jobs=3) as jobs:
            own = [jobs.add("a", Group(), "body", lambda: 1) for _ in range(5)]
            assert len(threads.started) == 3
            assert await jobs.add("b", Group(), "body", lambda: 2) == 2  # another tenant has jobs of its own
            assert not any(image.done() for image in own)

    run(use)


def test_error_belongs_to_its_image_and_ends_its_call_alone(threads: Threads) -> None:
    decoded: list[str] = []

    def bad() -> int:
        raise InvalidImage.at("images.1", "not an image")

    async def use() -> None:
        async with busy(threads) as jobs:
            wrong, right = Group(), Group()
            first, second, behind = (
                jobs.add("a", wrong, f"images.{i}", work)
                for i, work in enumerate((noted(decoded, "first"), bad, noted(decoded, "behind")))
            )
            other = jobs.add("a", right, "body", noted(decoded, "other"))
            threads.gate.set()
            assert await first == await other == 1
            with pytest.raises(InvalidImage, match=r"^images\.1: not an image"):
                await second
            behind.cancel()
        assert decoded == ["first", "other"]

    run(use)


def test_cancelled_image_leaves_the_queue_at_once(threads: Threads) -> None:
    decoded: list[str] = []

    async def use() -> None:
        async with busy(threads) as jobs:
            gone, stays = (jobs.add("a", Group(), "body", noted(decoded, name)) for name in ("gone", "stays"))
            gone.cancel()
            await asyncio.sleep(0)
            assert [len(waiting) for waiting in jobs._waiting.values()] == [1]  # otherwise its bytes would stay
            threads.gate.set()
            assert await stays == 1
        assert decoded == ["stays"]

    run(use)


def test_slow_decode_fails_its_own_image_and_another_job_takes_those_behind_it(threads: Threads) -> None:
    async def use() -> None:
        jobs = threads.jobs(share=2, tenant_jobs=1, timeout_s=0.1)
        before = jobs.add("a", Group(), "before", lambda: 1)
        slow = jobs.add("a", Group(), "slow", threads.wait)
        behind = jobs.add("a", Group(), "behind", lambda: 2)
        assert await before == 1
        with pytest.raises(InvalidImage, match=r"^slow: the image took more than 0\.1 s to decode"):
            await slow
        assert await behind == 2
        threads.gate.set()

    run(use)


def test_slow_image_delays_no_other_when_a_thread_is_free(threads: Threads) -> None:
    """Neither one that waited with it, nor one that comes later."""

    async def use() -> None:
        jobs = threads.jobs(share=2, tenant_jobs=1, timeout_s=60)
        quick = jobs.add("a", Group(), "quick", lambda: 1)
        slow = jobs.add("a", Group(), "slow", threads.wait)
        assert await quick == 1
        await until(lambda: threads.at_gate == 1)
        assert await jobs.add("a", Group(), "later", lambda: 2) == 2
        assert not slow.done()
        threads.gate.set()
        assert await slow == -1

    run(use)


def test_images_get_their_results_when_a_thread_begins_after_the_timeout(threads: Threads) -> None:
    async def late(tenant: str, work: Callable[[], None]) -> "asyncio.Future[None]":
        def begin() -> None:
            threads.gate.wait(10)
            work()

        return await threads.start(tenant, begin)

    async def use() -> None:
        jobs: DecodeJobs[int] = DecodeJobs(late, tenant_jobs=1, timeout_s=0.01)
        found = jobs.add("a", Group(), "body", lambda: 1)
        await asyncio.sleep(0.1)
        threads.gate.set()
        assert await found == 1

    run(use)


def test_image_before_a_wrong_one_is_decoded_when_two_threads_take_them() -> None:
    group = Group()
    before, wrong, behind = (group.next_number() for _ in range(3))
    group.fail(wrong)
    assert [group.is_behind_failed(number) for number in (before, wrong, behind)] == [False, False, True]


def test_waiting_images_fail_when_no_thread_starts() -> None:
    async def stopped(tenant: str, work: Callable[[], None]) -> "asyncio.Future[None]":
        raise RuntimeError("cannot schedule new futures after shutdown")

    async def use() -> None:
        jobs: DecodeJobs[int] = DecodeJobs(stopped, tenant_jobs=2, timeout_s=1)
        found = [jobs.add("a", Group(), "body", lambda: 1) for _ in range(3)]
        for error in await asyncio.gather(*found, return_exceptions=True):
            assert isinstance(error, RuntimeError)
        assert not jobs._waiting
        assert not jobs._open

    run(use)
