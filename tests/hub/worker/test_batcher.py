"""The batcher: nothing lost or doubled, order within a tenant, turns by weight, waits that end."""

import asyncio
from collections import Counter
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hub.errors import LimitReached
from hub.worker.batcher import Batcher


class Engine:
    """Doubles numbers; a batch takes as long as it is told to."""

    def __init__(self) -> None:
        self.batches: list[list] = []
        self.go = asyncio.Event()
        self.go.set()

    async def __call__(self, items):
        self.batches.append(list(items))
        await self.go.wait()
        await asyncio.sleep(0)
        if "bad" in items:
            raise RuntimeError("bad batch")
        return [f"{item}!" for item in items]


def batcher(engine, **changes) -> Batcher:
    options = {"batch_size": 4, "wait_s": 0.01, "tenant_queue": 1000} | changes
    size = options.pop("batch_size")
    return Batcher(engine, batch_size=lambda _uneven: size, **options)


def test_batches_are_told_whether_one_tenant_sends_much_more_than_another() -> None:
    async def use():
        now = 0.0
        told: list[bool] = []

        def size(uneven: bool) -> int:
            told.append(uneven)
            return 4

        batches = Batcher(Engine(), batch_size=size, wait_s=0, tenant_queue=10, clock=lambda: now)
        seen = {}
        sent = [
            *((0.0, "a", 1, 1), (0.5, "a", 8, 1)),  # alone
            *((1.2, "b", 4, 1), (1.3, "b", 1, 1), (1.4, "c", 1, 1)),  # 9 and 5; then one of them stands out
            *((2.5, "b", 1, 1), (5.0, "a", 2, 1), (5.1, "b", 8, 4), (5.2, "b", 10, 1)),  # a weight of 4: 2 and 2
            (8.0, "b", 1, 1),
        ]
        for now, tenant, images, weight in sent:
            del told[:]
            await batches.submit(tenant, ["x"] * images, weight)
            seen[now] = any(told)
        uneven = [now for now, was in seen.items() if was]
        assert uneven == [1.4, 2.5, 5.2]

    asyncio.run(use())


def test_what_was_refused_counts_as_sent() -> None:
    async def use():
        told: list[bool] = []

        def size(uneven: bool) -> int:
            told.append(uneven)
            return 4

        batches = Batcher(Engine(), batch_size=size, wait_s=0, tenant_queue=2, clock=lambda: 0.0)
        for tenant, images in (("a", 1), ("b", 3)):
            with suppress(LimitReached):
                await batches.submit(tenant, ["x"] * images)
        await batches.submit("a", ["x"])
        assert not any(told)  # 2 and 3
        with suppress(LimitReached):
            await batches.submit("b", ["x"] * 3)
        await batches.submit("b", ["x"])
        assert any(told)  # 2 and 7

    asyncio.run(use())


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


@settings(max_examples=100, deadline=None)
@given(
    calls=st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 11)), min_size=1, max_size=30),
    cancelled=st.sets(st.integers(0, 29)),
    size=st.integers(1, 7),
    in_flight=st.integers(1, 2),
)
def test_every_item_runs_once_and_gets_its_own_result(calls, cancelled, size, in_flight) -> None:
    async def use():
        engine = Engine()
        batches = batcher(engine, batch_size=size, in_flight=in_flight, wait_s=0)
        engine.go.clear()
        tasks = []
        for i, (tenant, count) in enumerate(calls):
            tasks.append(asyncio.create_task(batches.submit(tenant, [f"{tenant}{i}.{k}" for k in range(count)])))
            await asyncio.sleep(0)
        await settle()
        begun = {item for batch in engine.batches for item in batch}
        for i in cancelled & set(range(len(tasks))):
            tasks[i].cancel()
        engine.go.set()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        run = Counter(item for batch in engine.batches for item in batch)
        assert max(run.values()) == 1
        assert all(len(batch) <= size for batch in engine.batches)
        for i, (tenant, count) in enumerate(calls):
            items = [f"{tenant}{i}.{k}" for k in range(count)]
            if i in cancelled:
                assert isinstance(results[i], asyncio.CancelledError)
                assert {item for item in items if run[item]} <= begun  # dropped before it ran
            else:
                assert results[i] == [f"{item}!" for item in items]
        for tenant in "abc":  # first come, first served
            order = [item for batch in engine.batches for item in batch if item.startswith(tenant)]
            assert order == sorted(order, key=lambda item: tuple(map(int, item[1:].split("."))))
        assert batches.waiting == 0

    asyncio.run(use())


@settings(max_examples=50, deadline=None)
@given(
    weights=st.lists(st.sampled_from([0.5, 1.0, 2.0, 3.0]), min_size=2, max_size=4),
    size=st.integers(1, 9),
    seed=st.randoms(),
)
def test_tenants_with_much_waiting_share_by_weight(weights, size, seed) -> None:
    """After any number of whole batches each tenant has its share, to within one turn."""

    async def use():
        engine = Engine()
        batches = batcher(engine, batch_size=size, wait_s=0)
        engine.go.clear()
        tenants = [f"t{i}" for i in range(len(weights))]
        tasks = [asyncio.create_task(batches.submit("first", ["x"]))]
        await settle()
        order = list(zip(tenants, weights, strict=True))
        seed.shuffle(order)
        for tenant, weight in order:
            tasks.append(asyncio.create_task(batches.submit(tenant, [tenant] * 200, weight)))
        await settle()
        engine.go.set()
        await asyncio.gather(*tasks)
        taken: Counter = Counter()
        for batch in engine.batches[1:]:
            taken.update(batch)
            if max(taken.values()) > 200 - size:
                break  # from here on somebody has nothing waiting
            for tenant, weight in zip(tenants, weights, strict=True):
                share = taken.total() * weight / sum(weights)
                assert abs(taken[tenant] - share) <= 2 * max(weights) + 1

    asyncio.run(use())


def test_a_greedy_tenant_does_not_hold_up_another() -> None:
    async def use():
        engine = Engine()
        batches = batcher(engine)
        engine.go.clear()
        greedy = asyncio.create_task(batches.submit("greedy", ["g"] * 100))
        await settle()
        small = asyncio.create_task(batches.submit("small", ["s"]))
        await settle()
        engine.go.set()
        await small
        assert engine.batches[1].count("s") == 1
        await greedy

    asyncio.run(use())


def test_who_was_not_there_is_next_but_only_once() -> None:
    """Beside one tenant with much waiting, three that send again as soon as they are answered: each gets a quarter."""

    async def use():
        engine = Engine()
        engine.go.clear()
        batches = batcher(engine, batch_size=1, wait_s=0)
        greedy = asyncio.create_task(batches.submit("greedy", ["greedy"] * 40))
        await settle()

        async def closed_loop(tenant: str) -> None:
            for _ in range(10):
                await batches.submit(tenant, [tenant])

        late = [asyncio.create_task(closed_loop(tenant)) for tenant in "abc"]
        await settle()
        engine.go.set()
        await asyncio.gather(greedy, *late)
        order = [item for (item,) in engine.batches]
        assert set(order[1:4]) == set("abc")  # before any more of what waited before they came
        counts = Counter(order[1:37])
        assert all(8 <= counts[tenant] <= 10 for tenant in ("greedy", "a", "b", "c"))

    asyncio.run(use())


def test_turns_without_anything_waiting_are_saved_up_to_a_bound() -> None:
    """A tenant that was quiet for a while is next, with a few images at once, even where batches should be short."""

    async def use():
        engine = Engine()
        now = 0.0
        size = {True: 1, False: 8}
        batches = Batcher(
            engine, batch_size=lambda uneven: size[uneven], wait_s=0, tenant_queue=1000, clock=lambda: now
        )

        async def runs(count: int) -> list[list[str]]:
            before = len(engine.batches)
            while len(engine.batches) < before + count:
                engine.go.set()
                await asyncio.sleep(0)
                engine.go.clear()
                await settle()
            return engine.batches[before:]

        engine.go.clear()
        greedy = asyncio.create_task(batches.submit("greedy", ["greedy"] * 100))
        await settle()
        first = asyncio.create_task(batches.submit("small", ["small"]))
        await settle()
        assert await runs(4) == [["small"], *[["greedy"]] * 3]
        few = asyncio.create_task(batches.submit("small", ["small"] * 4))
        await settle()
        # It missed two turns when it came; from then on, one turn after another. What it has waiting says how short.
        assert await runs(3) == [["small", "small", "greedy", "small"], ["greedy"], ["small"]]
        assert await runs(30) == [["greedy"]] * 30
        many = asyncio.create_task(batches.submit("small", ["small"] * 20))
        await settle()
        assert await runs(4) == [*[["small"] * 8] * 2, ["greedy", "small"] * 2, ["greedy", "small"]]
        engine.go.set()
        await asyncio.gather(greedy, first, few, many)
        now = 3.0
        for _ in range(2):  # the first meets the others' turns, and they are forgotten
            await batches.submit("other", ["other"])
        assert set(batches._tenants) == {"other"}

    asyncio.run(use())


def test_who_sends_much_saves_nothing_up() -> None:
    """Else its next call of many images would be one large batch, for which who sends little waits."""

    async def use():
        engine = Engine()
        size = {True: 1, False: 8}
        batches = Batcher(
            engine, batch_size=lambda uneven: size[uneven], wait_s=0, tenant_queue=1000, clock=lambda: 0.0
        )
        await batches.submit("greedy", ["greedy"] * 100)
        for _ in range(20):
            await batches.submit("small", ["small"])
        del engine.batches[:]
        await batches.submit("greedy", ["greedy"] * 16)
        assert engine.batches == [["greedy"]] * 16

    asyncio.run(use())


def test_a_full_queue_refuses_its_own_tenant_only() -> None:
    async def use():
        engine = Engine()
        batches = batcher(engine, tenant_queue=10)
        engine.go.clear()
        first = asyncio.create_task(batches.submit("a", range(4)))
        await settle()  # runs
        second = asyncio.create_task(batches.submit("a", range(8)))
        await settle()  # waits
        with pytest.raises(LimitReached, match="8 images of this tenant are waiting for a worker, and at most 10 may"):
            await batches.submit("a", range(3))
        other = asyncio.create_task(batches.submit("b", range(10)))
        engine.go.set()
        assert len(await first) + len(await second) + len(await other) == 22

    asyncio.run(use())


def test_an_idle_batcher_waits_for_nothing_and_a_busy_one_for_as_many_as_before() -> None:
    async def use():
        engine = Engine()
        batches = batcher(engine, wait_s=60)
        await batches.submit("a", ["1"])
        engine.go.clear()
        burst = [asyncio.create_task(batches.submit("a", [str(i)])) for i in range(4)]
        await settle()
        engine.go.set()
        await asyncio.gather(*burst)
        assert [len(b) for b in engine.batches] == [1, 4]
        again = [asyncio.create_task(batches.submit("a", ["x"]))]
        await settle()
        assert len(engine.batches) == 2  # four came together a moment ago
        again += [asyncio.create_task(batches.submit("a", ["x"])) for _ in range(3)]
        await asyncio.gather(*again)
        assert len(engine.batches[2]) == 4

    asyncio.run(use())


def test_a_wait_ends() -> None:
    async def use():
        engine = Engine()
        batches = batcher(engine, wait_s=0.05)
        await batches.submit("a", range(4))
        assert await batches.submit("a", ["x"]) == ["x!"]
        assert await batches.submit("a", ["y"]) == ["y!"]

    asyncio.run(use())


def test_after_an_idle_time_nothing_is_waited_for() -> None:
    async def use():
        now = 0.0
        engine = Engine()
        batches = batcher(engine, wait_s=60, clock=lambda: now)
        await batches.submit("a", range(4))
        now += 61
        await asyncio.wait_for(batches.submit("a", ["x"]), 5)

    asyncio.run(use())


def test_a_second_batch_goes_beside_another_only_when_it_is_full() -> None:
    async def use():
        engine = Engine()
        batches = batcher(engine, in_flight=2)
        engine.go.clear()
        tasks = [asyncio.create_task(batches.submit("a", ["1"]))]
        await settle()
        tasks.append(asyncio.create_task(batches.submit("a", range(3))))
        await settle()
        assert len(engine.batches) == 1
        tasks.append(asyncio.create_task(batches.submit("b", ["2"])))
        await settle()
        assert [len(b) for b in engine.batches] == [1, 4]
        engine.go.set()
        await asyncio.gather(*tasks)

    asyncio.run(use())


def test_a_failing_batch_fails_its_own_callers_and_nothing_else() -> None:
    async def use():
        engine = Engine()
        batches = batcher(engine, batch_size=2)
        engine.go.clear()
        first = asyncio.create_task(batches.submit("a", ["ok"]))
        await settle()
        bad = asyncio.create_task(batches.submit("a", ["bad", "1", "2", "3"]))
        after = asyncio.create_task(batches.submit("b", ["4", "5", "6"]))
        await settle()
        engine.go.set()
        with pytest.raises(RuntimeError, match="bad batch"):
            await bad
        assert await first == ["ok!"]
        with pytest.raises(RuntimeError, match="bad batch"):  # its first item shared the bad one's batch
            await after
        assert await batches.submit("b", ["7"]) == ["7!"]

    asyncio.run(use())


def test_who_is_cancelled_between_the_choice_of_a_batch_and_its_start_is_not_run() -> None:
    async def use():
        engine = Engine()
        batches = batcher(engine, wait_s=0)
        take = batches._take

        def take_and_cancel():
            batch = take()
            gone.cancel()
            return batch

        batches._take = take_and_cancel
        gone = asyncio.create_task(batches.submit("a", ["gone"]))
        stays = asyncio.create_task(batches.submit("b", ["stays"]))
        assert await stays == ["stays!"]
        await asyncio.gather(gone, return_exceptions=True)
        assert engine.batches == [["stays"]]

    asyncio.run(use())
