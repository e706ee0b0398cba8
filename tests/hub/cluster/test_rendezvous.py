"""Rendezvous hashing with bounded loads: balance, little movement, bounded load, and the order of workers."""

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hub.cluster.rendezvous import (
    LOAD_FACTOR,
    MIN_CAPACITY,
    OWNERS_PER_ADAPTER,
    RESIDENT_ONLY,
    SAMPLED_WORKERS,
    RendezvousHash,
    RoutingTable,
    WorkerReport,
    load_bound,
    rank_workers,
)

DIGEST_CHARS = 16
DIGESTS = [f"{i:064x}" for i in range(4000)]
names = st.integers(1, 40).map(lambda n: [f"worker {i}" for i in range(n)])
loads_of_workers = st.dictionaries(st.integers(0, 30), st.integers(0, 60), min_size=2)


def hashed(workers: list[str]) -> RendezvousHash[str]:
    return RendezvousHash({worker: worker for worker in workers})


def table(*workers: str, **resident: str) -> RoutingTable[str]:
    """Return a table of workers; `resident` names the adapter that a worker reports."""
    made: RoutingTable[str] = RoutingTable(DIGEST_CHARS)
    digests = {worker: frozenset({digest[:DIGEST_CHARS]}) for worker, digest in resident.items()}
    made.update({worker: WorkerReport(worker, digests.get(worker, frozenset())) for worker in workers})
    return made


@given(names)
def test_an_adapter_has_two_owners_or_one_per_worker_if_there_are_fewer(workers: list[str]) -> None:
    found = hashed(workers).owners(DIGESTS[0])
    assert len(found) == len(set(found)) == min(OWNERS_PER_ADAPTER, len(workers))
    assert set(found) <= set(workers)


@given(names, st.randoms())
def test_owners_stay_the_same_when_workers_come_in_another_order(workers: list[str], shuffle: random.Random) -> None:
    shuffled = shuffle.sample(workers, len(workers))
    one, other = hashed(workers), hashed(shuffled)
    assert [one.owners(d) for d in DIGESTS[:20]] == [other.owners(d) for d in DIGESTS[:20]]


@pytest.mark.parametrize("count", [2, 3, 8, 50])
def test_workers_own_about_equally_many_adapters(count: int) -> None:
    found = hashed([f"worker {i}" for i in range(count)])
    first = Counter(found.owners(d)[0] for d in DIGESTS)
    both = Counter(w for d in DIGESTS for w in found.owners(d))
    for counts, mean in ((first, len(DIGESTS) / count), (both, OWNERS_PER_ADAPTER * len(DIGESTS) / count)):
        assert len(counts) == count
        spread = 5 * mean**0.5  # five standard deviations of a fair draw
        assert all(abs(n - mean) < spread for n in counts.values())


@pytest.mark.parametrize("count", [2, 3, 8, 50])
def test_a_new_worker_moves_only_the_adapters_that_it_owns(count: int) -> None:
    workers = [f"worker {i}" for i in range(count)]
    before, after = hashed(workers), hashed([*workers, "new"])
    gained = 0
    for digest in DIGESTS:
        old, new = before.owners(digest), after.owners(digest)
        gained += "new" in new
        if "new" not in new:
            assert new == old
        else:  # the remaining owners keep their order
            assert [w for w in new if w != "new"] == list(old[: OWNERS_PER_ADAPTER - 1])
    share = OWNERS_PER_ADAPTER * len(DIGESTS) / (count + 1)
    assert gained < 1.2 * share or count < OWNERS_PER_ADAPTER


@given(loads_of_workers, st.data())
def test_a_call_goes_to_an_owner_below_the_bound_else_to_the_least_loaded_worker(
    loads: dict[int, int], data: st.DataObject
) -> None:
    two = data.draw(st.permutations(list(loads)))[:2]
    resident = data.draw(st.sets(st.sampled_from(list(loads))))
    best, *others = rank_workers(two, loads, resident)
    assert len({best, *others}) == 1 + len(others)
    assert set(two) <= {best, *others}
    most = max(MIN_CAPACITY, LOAD_FACTOR * (sum(loads.values()) + 1) / len(loads) + 1)
    assert loads[best] + 1 <= most
    free = [w for w in two if loads[w] < load_bound(sum(loads.values()), len(loads))]
    assert best in free if free else loads[best] == min(loads.values())
    if resident & set(free):
        assert best in resident


def test_the_first_owner_wins_when_queues_are_equal_and_the_shorter_queue_when_they_are_not() -> None:
    assert rank_workers(("a", "b"), {"a": 0, "b": 0, "c": 0})[0] == "a"
    assert rank_workers(("a", "b"), {"a": 1, "b": 0, "c": 0})[0] == "b"
    assert rank_workers(("a", "b"), {"a": 1, "b": 0, "c": 0}, {"a"})[0] == "a"


def test_a_queue_below_one_batch_is_no_load_and_the_first_owner_loads_an_adapter() -> None:
    loads = {"a": 31, "b": 0, "c": 0}
    assert rank_workers(("a", "b"), loads, (), 32)[0] == "a"
    assert rank_workers(("a", "b"), loads, {"a"}, 32)[0] == "a"
    assert rank_workers(("a", "b"), loads, {"a", "b"}, 32)[0] == "b"
    assert rank_workers(("a", "b"), loads, {"a"}, 16)[0] == "b"
    assert rank_workers(("a", "b"), loads | {"a": 32}, {"a"}, 32)[0] == "b"


@given(st.integers(1, 12), st.lists(st.integers(0, 3), min_size=1, max_size=300))
def test_no_worker_exceeds_the_bound_when_calls_come_and_none_ends(count: int, picks: list[int]) -> None:
    workers = [f"worker {i}" for i in range(count)]
    owners, load = hashed(workers), dict.fromkeys(workers, 0)
    for total, pick in enumerate(picks):
        load[rank_workers(owners.owners(DIGESTS[pick]), load)[0]] += 1
        assert max(load.values()) <= load_bound(total, count)


def no_queue(_worker: str) -> int:
    return 0


def test_a_call_is_offered_to_its_owner_first_and_to_all_workers_last() -> None:
    workers = [f"w{i}" for i in range(5)]
    first, second = hashed(workers).owners(DIGESTS[7])
    groups = table(*workers).route(DIGESTS[7], workers, no_queue)
    assert groups[0] == [first]
    assert sorted(worker for group in groups for worker in group) == workers
    groups = table(*workers).route(DIGESTS[7], workers, lambda worker: int(worker == first))
    assert groups[0] == [second]
    holding = table(*workers, **{first: DIGESTS[7]})
    assert holding.route(DIGESTS[7], workers, lambda worker: int(worker == first))[0] == [first]


def test_a_call_is_not_offered_to_an_owner_that_has_just_died() -> None:
    workers = [f"w{i}" for i in range(5)]
    first, _ = hashed(workers).owners(DIGESTS[7])
    alive = [worker for worker in workers if worker != first]
    groups = table(*workers).route(DIGESTS[7], alive, no_queue)
    assert sorted(worker for group in groups for worker in group) == alive


def test_a_call_that_an_owner_could_not_serve_goes_only_to_workers_that_hold_the_adapter() -> None:
    digest = "d" * 64
    some = table("w0", "w1", "w2", w1=digest, w2="e" * 64)
    assert some.route(digest + RESIDENT_ONLY, ["w0", "w1", "w2"], no_queue) == [["w1"]]
    left = ["w0", "w2"]
    assert some.route(digest + RESIDENT_ONLY, left, no_queue) == some.route(digest, left, no_queue)


def test_a_table_uses_the_smallest_reported_batch() -> None:
    workers = ["w0", "w1", "w2"]
    first, second = hashed(workers).owners(DIGESTS[0])
    some: RoutingTable[str] = RoutingTable(DIGEST_CHARS)

    def best(batch: int) -> str:
        reports = {worker: WorkerReport(worker, batch=batch) for worker in workers}
        some.update(reports | {first: WorkerReport(first)})  # no report yet
        return some.route(DIGESTS[0], workers, lambda worker: 5 * (worker == first))[0][0]

    assert (best(1), best(32)) == (second, first)


def test_a_call_considers_a_sample_when_there_are_many_workers() -> None:
    workers = [f"w{i}" for i in range(200)]
    groups = table(*workers).route(DIGESTS[0], workers, no_queue)
    assert groups[0] == [hashed(workers).owners(DIGESTS[0])[0]]
    assert SAMPLED_WORKERS <= sum(map(len, groups)) <= SAMPLED_WORKERS + OWNERS_PER_ADAPTER


def test_the_hub_s_router_has_fewer_hot_spots_than_hashing_and_more_hits_than_random_choice() -> None:
    """A short run of the benchmark's simulation, with its fixed seed."""
    from benchmarks.routing import HashRouter, OursRouter, RandomRouter, simulate

    by_hash, by_chance, ours = (simulate(router(), 8, calls=6000) for router in (HashRouter, RandomRouter, OursRouter))
    assert ours.p99 < 1.5 * by_chance.p99 < by_hash.p99 / 5
    assert by_chance.hits + 0.08 < ours.hits < by_hash.hits
