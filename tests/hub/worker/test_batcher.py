"""The batcher: when a batch starts, and that every call gets its own results."""

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from contextvars import ContextVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hub.errors import LimitReached
from hub.worker.batcher import Batcher
from hub.worker.fair_queue import BatchSize

CALLER: ContextVar[str] = ContextVar("caller", default="")


class Engine:
    """Appends "!" to items. A batch ends when `go` is set."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.shared: list[bool] = []
        self.running: list[bool] = []  # `shared` of each batch that runs
        self.most_running = 0
        self.go = asyncio.Event()
        self.go.set()

    async def __call__(self, items: list[str], shared: bool) -> Sequence[str]:
        self.batches.append(list(items))
        self.shared.append(shared)
        self.running.append(shared)
        assert len(self.running) == 1 or all(self.running), "a batch with all cores beside another"
        self.most_running = max(self.most_running, len(self.running))
        await self.go.wait()
        await asyncio.sleep(0)
        self.running.remove(shared)
        if "bad" in items:
            raise RuntimeError("bad batch")
        return [f"{item}!" for item in items]


def make_batcher(
    engine: Engine,
    *,
    batch_size: int = 4,
    wait_s: float = 0.01,
    tenant_limit: int = 1000,
    shared_size: BatchSize | None = None,
    always_shared: bool = False,
    images_of: Callable[[str], int] = lambda _: 1,
    clock: Callable[[], float] | None = None,
) -> Batcher[str, str]:
    size = BatchSize(batch_size, batch_size)
    clock = clock or asyncio.get_running_loop().time
    return Batcher(
        engine,
        batch_size=lambda: size,
        wait_s=wait_s,
        tenant_limit=tenant_limit,
        shared_size=lambda: shared_size,
        always_shared=always_shared,
        images_of=images_of,
        clock=clock,
    )


def named(count: int) -> list[str]:
    return [str(i) for i in range(count)]


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


@settings(max_examples=100, deadline=None)
@given(
    calls=st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 11)), min_size=1, max_size=30),
    cancelled=st.sets(st.integers(0, 29)),
    size=st.integers(1, 7),
    shared=st.sampled_from([None, "always", "for several calls"]),
)
def test_every_item_runs_once_and_gets_its_own_result(
    calls: list[tuple[str, int]], cancelled: set[int], size: int, shared: str | None
) -> None:
    async def use() -> None:
        engine = Engine()
        shared_size = BatchSize(size, size, beside=1) if shared else None
        batcher = make_batcher(
            engine, batch_size=size, shared_size=shared_size, always_shared=shared == "always", wait_s=0
        )
        engine.go.clear()
        tasks = []
        for i, (tenant, count) in enumerate(calls):
            tasks.append(asyncio.create_task(batcher.submit(tenant, [f"{tenant}{i}.{k}" for k in range(count)])))
            await asyncio.sleep(0)
        await settle()
        started = {item for batch in engine.batches for item in batch}
        for i in cancelled & set(range(len(tasks))):
            tasks[i].cancel()
        engine.go.set()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        run = Counter(item for batch in engine.batches for item in batch)
        assert max(run.values()) == 1
        assert engine.most_running <= (2 if shared else 1)
        assert all(len(batch) <= size for batch in engine.batches)
        for i, (tenant, count) in enumerate(calls):
            items = [f"{tenant}{i}.{k}" for k in range(count)]
            if i in cancelled:
                assert isinstance(results[i], asyncio.CancelledError)
                assert {item for item in items if run[item]} <= started  # removed before they ran
            else:
                assert results[i] == [f"{item}!" for item in items]
        for tenant in "abc":
            order = [item for batch in engine.batches for item in batch if item.startswith(tenant)]
            assert order == sorted(order, key=lambda item: tuple(map(int, item[1:].split("."))))
        assert batcher.queued == 0

    asyncio.run(use())


def test_a_small_tenant_is_in_the_next_batch_when_another_tenant_has_a_long_queue() -> None:
    async def use() -> None:
        engine = Engine()
        batcher = make_batcher(engine)
        engine.go.clear()
        greedy = asyncio.create_task(batcher.submit("greedy", ["g"] * 100))
        await settle()
        small = asyncio.create_task(batcher.submit("small", ["s"]))
        await settle()
        engine.go.set()
        await small
        assert engine.batches[1].count("s") == 1
        await greedy

    asyncio.run(use())


def test_a_refused_call_runs_no_item() -> None:
    async def use() -> None:
        engine = Engine()
        batcher = make_batcher(engine, tenant_limit=10)
        engine.go.clear()
        first = asyncio.create_task(batcher.submit("a", ["x"] * 4))
        await settle()  # the first call runs
        second = asyncio.create_task(batcher.submit("a", ["x"] * 8))
        await settle()  # the second call is queued
        with pytest.raises(LimitReached):
            await batcher.submit("a", ["refused"] * 3)
        other = asyncio.create_task(batcher.submit("b", ["x"] * 10))
        engine.go.set()
        assert len(await first) + len(await second) + len(await other) == 22
        assert "refused" not in {item for batch in engine.batches for item in batch}

    asyncio.run(use())


def test_a_batch_waits_for_as_many_items_as_the_last_one_had() -> None:
    async def use() -> None:
        engine = Engine()
        batcher = make_batcher(engine, wait_s=60, clock=lambda: 0.0)
        await batcher.submit("a", ["1"])  # an idle batcher does not wait
        engine.go.clear()
        burst = [asyncio.create_task(batcher.submit("a", [item])) for item in named(4)]
        await settle()
        engine.go.set()
        await asyncio.gather(*burst)
        assert [len(batch) for batch in engine.batches] == [1, 4]
        again = [asyncio.create_task(batcher.submit("a", ["x"]))]
        await settle()
        assert len(engine.batches) == 2
        again += [asyncio.create_task(batcher.submit("a", ["x"])) for _ in range(3)]
        await asyncio.gather(*again)
        assert len(engine.batches[2]) == 4

    asyncio.run(use())


def test_a_batch_starts_when_its_wait_ends() -> None:
    async def use() -> None:
        batcher = make_batcher(Engine(), wait_s=0.01)
        await batcher.submit("a", named(4))
        assert await batcher.submit("a", ["x"]) == ["x!"]
        assert await batcher.submit("a", ["y"]) == ["y!"]

    asyncio.run(use())


def test_a_batch_starts_at_once_when_the_batcher_was_idle() -> None:
    async def use() -> None:
        now_s = 0.0
        batcher = make_batcher(Engine(), wait_s=60, clock=lambda: now_s)
        await batcher.submit("a", named(4))
        now_s = 61.0
        call = asyncio.create_task(batcher.submit("a", ["x"]))
        await settle()
        assert call.done()

    asyncio.run(use())


def test_batches_on_a_gpu_wait_until_they_are_full_while_another_runs() -> None:
    async def use() -> None:
        engine = Engine()
        batcher = make_batcher(engine, shared_size=BatchSize(4, 4, beside=4), always_shared=True)
        engine.go.clear()
        tasks = [asyncio.create_task(batcher.submit("a", ["1"]))]
        await settle()
        tasks.append(asyncio.create_task(batcher.submit("a", named(3))))
        await settle()
        assert len(engine.batches) == 1
        tasks.append(asyncio.create_task(batcher.submit("b", ["2"])))
        await settle()
        assert [len(batch) for batch in engine.batches] == [1, 4]
        engine.go.set()
        await asyncio.gather(*tasks)

    asyncio.run(use())


def test_several_calls_with_enough_images_run_in_two_batches_at_once() -> None:
    async def use() -> None:
        engine = Engine()
        batcher = make_batcher(engine, batch_size=16, shared_size=BatchSize(8, 8, beside=2))
        engine.go.clear()
        calls = [asyncio.create_task(batcher.submit("a", [item])) for item in named(7)]
        await settle()
        assert [len(batch) for batch in engine.batches] == [3, 3]  # halves of the seven; one image waits
        assert engine.shared == [True, True]
        engine.go.set()
        await asyncio.gather(*calls)
        assert sum(map(len, engine.batches)) == 7

    asyncio.run(use())


@pytest.mark.parametrize("calls", [[12], [1, 1], [3]])
def test_a_call_alone_and_few_images_have_all_cores(calls: list[int]) -> None:
    async def use() -> None:
        engine = Engine()
        batcher = make_batcher(engine, batch_size=16, shared_size=BatchSize(8, 8, beside=2))
        engine.go.clear()
        tasks = [asyncio.create_task(batcher.submit("a", ["x"] * count)) for count in calls]
        await settle()
        assert ([len(batch) for batch in engine.batches], engine.shared) == ([sum(calls)], [False])
        engine.go.set()
        await asyncio.gather(*tasks)

    asyncio.run(use())


def test_batches_beside_a_heavy_tenant_have_all_cores() -> None:
    async def use() -> None:
        engine = Engine()
        batcher = make_batcher(engine, batch_size=4, shared_size=BatchSize(4, 4, beside=2), wait_s=0)
        engine.go.clear()
        calls = [asyncio.create_task(batcher.submit("a", [item])) for item in named(8)]
        await settle()
        assert engine.shared == [True, True]
        calls.append(asyncio.create_task(batcher.submit("b", ["light"])))
        calls.append(asyncio.create_task(batcher.submit("a", named(16))))
        await settle()
        engine.go.set()
        await asyncio.gather(*calls)
        assert not any(engine.shared[2:])
        assert "light" in engine.batches[2]

    asyncio.run(use())


def test_two_batches_at_once_count_an_item_as_its_images() -> None:
    async def use() -> None:
        engine = Engine()
        batcher = make_batcher(
            engine, batch_size=16, shared_size=BatchSize(8, 8, beside=4), wait_s=0, images_of=lambda _: 4
        )
        engine.go.clear()
        calls = [asyncio.create_task(batcher.submit("a", [item])) for item in named(4)]
        await settle()
        assert [len(batch) for batch in engine.batches] == [2, 2]  # eight images each
        engine.go.set()
        await asyncio.gather(*calls)

    asyncio.run(use())


def test_a_batch_starts_beside_another_when_it_is_as_large_as_the_last_one() -> None:
    async def use() -> None:
        engine = Engine()
        batcher = make_batcher(engine, batch_size=16, shared_size=BatchSize(8, 8, beside=2), wait_s=0)
        engine.go.clear()
        first = [asyncio.create_task(batcher.submit("a", [item])) for item in named(10)]
        await settle()
        assert [len(batch) for batch in engine.batches] == [5, 5]
        engine.go.set()
        await asyncio.gather(*first)
        engine.go.clear()
        second = [asyncio.create_task(batcher.submit("a", [item])) for item in named(4)]
        await settle()
        assert [len(batch) for batch in engine.batches[2:]] == [4]  # half of the ten at once may come, so up to five
        second += [asyncio.create_task(batcher.submit("a", [item])) for item in named(3)]
        await settle()
        assert len(engine.batches) == 3
        second.append(asyncio.create_task(batcher.submit("a", ["8"])))
        await settle()
        assert [len(batch) for batch in engine.batches[2:]] == [4, 4]
        engine.go.set()
        await asyncio.gather(*second)

    asyncio.run(use())


def test_a_call_that_comes_alone_later_has_all_cores_again() -> None:
    async def use() -> None:
        now_s = 0.0
        engine = Engine()
        batcher = make_batcher(
            engine, batch_size=16, shared_size=BatchSize(8, 8, beside=2), wait_s=0, clock=lambda: now_s
        )
        await asyncio.gather(*(batcher.submit("a", [item]) for item in named(8)))
        assert engine.shared[-1]
        await batcher.submit("a", named(4))
        assert not engine.shared[-1]
        now_s = 3.0
        await asyncio.gather(batcher.submit("a", ["1"]), batcher.submit("a", ["2"]))
        assert not engine.shared[-1]  # two images, without those of batches that ended

    asyncio.run(use())


def test_a_failed_batch_fails_only_the_calls_with_items_in_it() -> None:
    async def use() -> None:
        engine = Engine()
        batcher = make_batcher(engine, batch_size=2)
        engine.go.clear()
        first = asyncio.create_task(batcher.submit("a", ["ok"]))
        await settle()
        bad = asyncio.create_task(batcher.submit("a", ["bad", "1", "2", "3"]))
        after = asyncio.create_task(batcher.submit("b", ["4", "5", "6"]))
        await settle()
        engine.go.set()
        with pytest.raises(RuntimeError, match="bad batch"):
            await bad
        assert await first == ["ok!"]
        with pytest.raises(RuntimeError, match="bad batch"):  # its first item was in the same batch as "bad"
            await after
        assert await batcher.submit("b", ["7"]) == ["7!"]
        assert "3" not in {item for batch in engine.batches for item in batch}  # removed with its failed call

    asyncio.run(use())


def test_an_item_is_not_run_when_its_call_is_cancelled_before_its_batch_starts() -> None:
    async def use() -> None:
        engine = Engine()
        batcher = make_batcher(engine, wait_s=0)
        gone = asyncio.create_task(batcher.submit("a", ["gone"]))
        stays = asyncio.create_task(batcher.submit("b", ["stays"]))
        await asyncio.sleep(0)  # both calls are queued; their batch is taken before the cancelled call resumes
        gone.cancel()
        assert await stays == ["stays!"]
        with pytest.raises(asyncio.CancelledError):
            await gone
        assert engine.batches == [["stays"]]

    asyncio.run(use())


def test_next_batch_starts_before_the_callers_of_the_last_one_go_on() -> None:
    async def main() -> None:
        order: list[str] = []
        started = asyncio.Event()

        async def run(items: list[str], shared: bool) -> list[str]:
            order.append(f"batch of {items[0]}")
            started.set()
            await asyncio.sleep(0.01)
            return items

        async def call(item: str) -> None:
            await batcher.submit(item, [item])
            order.append(f"answer to {item}")

        size = BatchSize(1, 1)
        batcher: Batcher[str, str] = Batcher(run, batch_size=lambda: size, wait_s=0, tenant_limit=10)
        first = asyncio.create_task(call("a"))
        await started.wait()
        await asyncio.gather(first, call("b"))
        assert order == ["batch of a", "batch of b", "answer to a", "answer to b"]

    asyncio.run(main())


def test_batch_has_the_context_of_no_call() -> None:
    async def main() -> None:
        seen: list[str] = []

        async def run(items: list[str], shared: bool) -> list[str]:
            seen.append(CALLER.get())
            return items

        batcher: Batcher[str, str] = Batcher(run, batch_size=lambda: BatchSize(1, 1), wait_s=0, tenant_limit=10)
        CALLER.set("a")
        await batcher.submit("a", ["1", "2"])
        assert seen == ["", ""]

    asyncio.run(main())
