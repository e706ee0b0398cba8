"""The fair queue: shares by weight, saved-up turns, short batches beside a heavy tenant."""

import random
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hub.errors import LimitReached
from hub.worker.fair_queue import BatchSize, FairQueue

SHORT_OR_LONG = BatchSize(full=8, short=1)


def push(queue: FairQueue[str], tenant: str, count: int, *, weight: float = 1.0, now_s: float = 0.0) -> None:
    """Queue items that are named as their tenant."""
    queue.push(tenant, [tenant] * count, weight, now_s)


def pop(queue: FairQueue[str], batches: int, size: BatchSize, now_s: float = 0.0) -> list[list[str]]:
    return [queue.pop_batch(size, now_s) for _ in range(batches)]


def one_by_one(queue: FairQueue[str], count: int) -> list[str]:
    return [item for batch in pop(queue, count, BatchSize(1, 1)) for item in batch]


def test_an_empty_queue_gives_an_empty_batch() -> None:
    queue: FairQueue[str] = FairQueue(10)
    assert queue.pop_batch(BatchSize(4, 4), 0.0) == []


def test_the_items_of_a_tenant_leave_in_their_order() -> None:
    queue: FairQueue[int] = FairQueue(10)
    queue.push("a", [1, 2, 3], 1.0, 0.0)
    queue.push("a", [4, 5], 1.0, 0.0)
    assert [queue.pop_batch(BatchSize(2, 2), 0.0) for _ in range(3)] == [[1, 2], [3, 4], [5]]
    assert len(queue) == 0


@settings(max_examples=50, deadline=None)
@given(
    weights=st.lists(st.sampled_from([0.5, 1.0, 2.0, 3.0]), min_size=2, max_size=4),
    size=st.integers(1, 9),
    seed=st.integers(0, 1000),
)
def test_tenants_share_by_weight_when_all_have_queued_items(weights: list[float], size: int, seed: int) -> None:
    """After every batch each tenant has had its share, to within one turn."""
    queue: FairQueue[str] = FairQueue(200)
    shares = {f"t{i}": weight for i, weight in enumerate(weights)}
    tenants = list(shares)
    random.Random(seed).shuffle(tenants)
    for tenant in tenants:
        push(queue, tenant, 200, weight=shares[tenant])
    taken: Counter[str] = Counter()
    while max(taken.values(), default=0) <= 200 - size:
        taken.update(queue.pop_batch(BatchSize(size, size), 0.0))
        for tenant, weight in shares.items():
            assert abs(taken[tenant] - taken.total() * weight / sum(weights)) <= 2 * max(weights) + 1


def test_new_tenants_are_next_but_only_once_when_another_tenant_has_a_long_queue() -> None:
    """Three tenants send their next image when the last one leaves: each tenant gets a quarter."""
    queue: FairQueue[str] = FairQueue(100)
    push(queue, "greedy", 40)
    assert one_by_one(queue, 1) == ["greedy"]
    for tenant in "abc":
        push(queue, tenant, 1)
    order = []
    for _ in range(36):
        (tenant,) = one_by_one(queue, 1)
        order.append(tenant)
        if tenant in "abc":
            push(queue, tenant, 1)
    assert set(order[:3]) == set("abc")
    counts = Counter(order)
    assert all(8 <= counts[tenant] <= 10 for tenant in ("greedy", "a", "b", "c"))


def test_a_tenant_uses_its_saved_turns_at_once_when_it_sends_again() -> None:
    queue: FairQueue[str] = FairQueue(1000)
    push(queue, "greedy", 100)
    push(queue, "small", 1)
    assert pop(queue, 4, SHORT_OR_LONG) == [["small"], *[["greedy"]] * 3]
    push(queue, "small", 4)
    # Two turns were saved; then the tenants alternate. The four queued images make the first batch larger.
    assert pop(queue, 3, SHORT_OR_LONG) == [["small", "small", "greedy", "small"], ["greedy"], ["small"]]


def test_saved_turns_are_bounded() -> None:
    queue: FairQueue[str] = FairQueue(1000)
    push(queue, "greedy", 100)
    push(queue, "small", 1)
    assert pop(queue, 31, SHORT_OR_LONG) == [["small"], *[["greedy"]] * 30]
    push(queue, "small", 20)
    full = ["small"] * 8
    assert pop(queue, 4, SHORT_OR_LONG) == [full, full, ["greedy", "small"] * 2, ["greedy", "small"]]


def test_a_tenant_is_forgotten_with_its_saved_turns_when_it_sends_nothing_for_two_windows() -> None:
    queue: FairQueue[str] = FairQueue(1000)
    push(queue, "greedy", 100)
    push(queue, "small", 1)
    pop(queue, 11, SHORT_OR_LONG)
    push(queue, "greedy", 1, now_s=3.0)
    pop(queue, 2, SHORT_OR_LONG, now_s=3.0)  # these batches pass over the turn of `small`
    push(queue, "small", 4, now_s=3.0)
    assert pop(queue, 1, BatchSize(4, 4), now_s=3.0) == [["small", "greedy", "small", "greedy"]]


def test_a_heavy_tenant_saves_no_turns() -> None:
    """Otherwise its next call would be one large batch, and light tenants would wait for it."""
    queue: FairQueue[str] = FairQueue(1000)
    push(queue, "greedy", 100)
    pop(queue, 100, SHORT_OR_LONG)
    for _ in range(20):
        push(queue, "small", 1)
        assert pop(queue, 1, SHORT_OR_LONG) == [["small"]]
    push(queue, "greedy", 16)
    assert pop(queue, 16, SHORT_OR_LONG) == [["greedy"]] * 16


def test_batches_are_short_when_one_tenant_sent_much_more_than_another() -> None:
    queue: FairQueue[str] = FairQueue(100)
    short = []
    calls = [
        *((0.0, "a", 1, 1), (0.5, "a", 8, 1)),  # one tenant only
        *((1.2, "b", 5, 1), (1.3, "b", 1, 1), (1.4, "c", 1, 1)),  # 9 and 6 images; then 1 image of a third tenant
        *((2.5, "b", 1, 1), (5.0, "a", 2, 1), (5.1, "b", 8, 4), (5.2, "b", 10, 1)),  # 8 images of weight 4 count as 2
        (8.0, "b", 1, 1),
    ]
    for now_s, tenant, images, weight in calls:
        push(queue, tenant, images, weight=weight, now_s=now_s)
        if queue.batch_limit(BatchSize(full=50, short=0), now_s) < 50:
            short.append(now_s)
        while queue.pop_batch(BatchSize(50, 50), now_s):
            pass
    assert short == [1.4, 2.5, 5.2]


def test_a_tenant_is_heavy_from_twice_its_neighbours_images_on() -> None:
    queue: FairQueue[str] = FairQueue(100)
    size = BatchSize(full=50, short=0)
    push(queue, "a", 4)
    push(queue, "b", 7)
    assert queue.batch_limit(size, 0.0) == 50
    push(queue, "b", 1)
    assert queue.batch_limit(size, 0.0) < 50


def test_refused_images_count_as_sent() -> None:
    queue: FairQueue[str] = FairQueue(2)
    size = BatchSize(full=50, short=0)
    push(queue, "a", 2)
    for expected in (50, 0):  # 2 and 3 images; then 2 and 6
        with suppress(LimitReached):
            push(queue, "b", 3)
        assert queue.batch_limit(size, 0.0) == expected


def test_a_full_queue_refuses_its_own_tenant_only() -> None:
    queue: FairQueue[str] = FairQueue(10)
    push(queue, "a", 8)
    with pytest.raises(LimitReached, match=r"8 queued, 3 more, limit 10\. Retry later"):
        push(queue, "a", 3)
    push(queue, "b", 10)
    assert len(queue) == 18


def test_discarded_items_leave_the_queue_and_the_others_stay() -> None:
    queue: FairQueue[int] = FairQueue(4)
    queue.push("a", [1, 2, 3, 4], 1.0, 0.0)
    assert queue.pop_batch(BatchSize(1, 1), 0.0) == [1]
    queue.discard("a", [1, 3])
    queue.discard("unknown", [2])
    assert len(queue) == 2
    queue.push("a", [5, 6], 1.0, 0.0)  # the discarded item makes room
    assert queue.pop_batch(BatchSize(9, 9), 0.0) == [2, 4, 5, 6]


@settings(max_examples=100, deadline=None)
@given(
    steps=st.lists(
        st.tuples(st.sampled_from("abc"), st.integers(0, 9), st.sampled_from([0.0, 0.4, 3.0]), st.integers(1, 7)),
        max_size=40,
    )
)
def test_no_item_is_lost_or_doubled(steps: Sequence[tuple[str, int, float, int]]) -> None:
    queue: FairQueue[tuple[str, int]] = FairQueue(10_000)
    pushed: dict[str, int] = dict.fromkeys("abc", 0)
    popped: dict[str, list[int]] = {tenant: [] for tenant in "abc"}
    now_s = 0.0
    for tenant, count, pause_s, size in steps:
        now_s += pause_s
        queue.push(tenant, [(tenant, pushed[tenant] + i) for i in range(count)], 1.0, now_s)
        pushed[tenant] += count
        for owner, number in queue.pop_batch(BatchSize(size, 1), now_s):
            popped[owner].append(number)
    while batch := queue.pop_batch(BatchSize(5, 5), now_s):
        for owner, number in batch:
            popped[owner].append(number)
    assert {tenant: len(numbers) for tenant, numbers in popped.items()} == pushed
    assert all(numbers == sorted(numbers) for numbers in popped.values())


def test_an_item_counts_as_its_images_in_batches_turns_and_the_limit() -> None:
    queue: FairQueue[tuple[str, int]] = FairQueue(10, lambda item: item[1])
    queue.push("a", [("a", 3), ("a", 3), ("a", 1)], 1.0, 0.0)
    queue.push("b", [("b", 1)] * 7, 1.0, 0.0)
    assert len(queue) == 14
    with pytest.raises(LimitReached, match="7 queued, 4 more, limit 10"):
        queue.push("a", [("a", 4)], 1.0, 0.0)
    taken = [item for batch in (queue.pop_batch(BatchSize(2, 2), 0.0) for _ in range(9)) for item in batch]
    assert len(queue) == 0
    # After each item of three images of `a`, `b` has three turns alone.
    assert "".join(tenant for tenant, _ in taken) in ("abbbabbba", "babbbabbba", "abbbabbbab", "babbbabbab")


def test_an_item_larger_than_the_batch_runs_alone() -> None:
    queue: FairQueue[int] = FairQueue(10, lambda images: images)
    queue.push("a", [4, 2], 1.0, 0.0)
    assert [queue.pop_batch(BatchSize(1, 1), 0.0) for _ in range(3)] == [[4], [2], []]
    queue.push("a", [4, 2], 1.0, 0.0)
    queue.discard("a", [4])
    assert len(queue) == 2
