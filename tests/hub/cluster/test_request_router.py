"""Which worker owns an adapter and gets its call: balance, little movement, bounded load; then the router itself."""

import asyncio
from collections import Counter
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hub.cluster.rendezvous import BOUND, OWNERS, SHORT, WARM, Owners, ranked, room

pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own, at import
DIGESTS = [f"{i:064x}" for i in range(4000)]
names = st.integers(1, 40).map(lambda n: [f"worker {i}" for i in range(n)])


def owners(workers: list[str]) -> Owners[str]:
    return Owners({worker: worker for worker in workers})


@given(names)
def test_an_adapter_has_two_owners_or_as_many_as_there_are(workers) -> None:
    found = owners(workers).of(DIGESTS[0])
    assert len(found) == len(set(found)) == min(OWNERS, len(workers))
    assert set(found) <= set(workers)


@given(names, st.randoms())
def test_owners_do_not_depend_on_the_order_in_which_workers_are_told(workers, random) -> None:
    shuffled = random.sample(workers, len(workers))
    assert [owners(workers).of(d) for d in DIGESTS[:20]] == [owners(shuffled).of(d) for d in DIGESTS[:20]]


@pytest.mark.parametrize("count", [2, 3, 8, 50])
def test_every_worker_owns_about_as_many(count) -> None:
    found = owners([f"worker {i}" for i in range(count)])
    first = Counter(found.of(d)[0] for d in DIGESTS)
    both = Counter(w for d in DIGESTS for w in found.of(d))
    for counts, mean in ((first, len(DIGESTS) / count), (both, OWNERS * len(DIGESTS) / count)):
        assert len(counts) == count
        spread = 5 * mean**0.5  # five standard deviations of a fair draw
        assert all(abs(n - mean) < spread for n in counts.values())


@pytest.mark.parametrize("count", [2, 3, 8, 50])
def test_a_worker_that_comes_or_goes_moves_only_what_it_owns(count) -> None:
    workers = [f"worker {i}" for i in range(count)]
    before, after = owners(workers), owners([*workers, "new"])
    gained = 0
    for digest in DIGESTS:
        old, new = before.of(digest), after.of(digest)
        gained += "new" in new
        if "new" not in new:
            assert new == old
        else:  # whoever stays keeps its rank beside the others
            assert [w for w in new if w != "new"] == list(old[: OWNERS - 1])
    assert gained < 1.2 * OWNERS * len(DIGESTS) / (count + 1) or count < OWNERS


loads = st.dictionaries(st.integers(0, 30), st.integers(0, 60), min_size=2)


@given(loads, st.data())
def test_a_call_goes_to_an_owner_with_room_else_to_the_least_busy_worker(loads, data) -> None:
    two = data.draw(st.permutations(list(loads)))[:2]
    resident = data.draw(st.sets(st.sampled_from(list(loads))))
    best, *others = ranked(two, loads, resident)
    assert len({best, *others}) == 1 + len(others)
    assert set(two) <= {best, *others}
    most = max(SHORT, BOUND * (sum(loads.values()) + 1) / len(loads) + 1)
    assert loads[best] + 1 <= most
    free = [w for w in two if loads[w] < room(sum(loads.values()), len(loads))]
    assert best in free if free else loads[best] == min(loads.values())
    if resident & set(free):
        assert best in resident


def test_of_equal_owners_the_first_is_taken_and_the_shorter_queue_of_unequal_ones() -> None:
    assert ranked(("a", "b"), {"a": 0, "b": 0, "c": 0})[0] == "a"
    assert ranked(("a", "b"), {"a": 1, "b": 0, "c": 0})[0] == "b"
    assert ranked(("a", "b"), {"a": 1, "b": 0, "c": 0}, {"a"})[0] == "a"


def test_less_than_a_batch_is_not_too_much_and_cold_adapters_keep_to_their_first_owner() -> None:
    loads = {"a": 31, "b": 0, "c": 0}
    assert ranked(("a", "b"), loads, (), 32)[0] == "a"
    assert ranked(("a", "b"), loads, {"a"}, 32)[0] == "a"
    assert ranked(("a", "b"), loads, {"a", "b"}, 32)[0] == "b"
    assert ranked(("a", "b"), loads, {"a"}, 16)[0] == "b"
    assert ranked(("a", "b"), loads | {"a": 32}, {"a"}, 32)[0] == "b"


@given(st.integers(1, 12), st.lists(st.integers(0, 3), min_size=1, max_size=300))
def test_no_load_passes_the_bound_whatever_comes_and_nothing_leaves(count, picks) -> None:
    """Three hot adapters and one more; every call stays."""
    workers = [f"worker {i}" for i in range(count)]
    own, load = owners(workers), dict.fromkeys(workers, 0)
    for total, pick in enumerate(picks):
        load[ranked(own.of(DIGESTS[pick]), load)[0]] += 1
        assert max(load.values()) <= room(total, count)


@pytest.fixture
def router():
    """Our router as Serve has it, without Serve: the base class's queues are real, the cluster is not there."""
    from ray.serve._private.request_router.common import ReplicaQueueLengthCache
    from ray.serve._private.request_router.request_router import RequestRouter

    from hub.cluster.request_router import OwnersRouter

    router = OwnersRouter.__new__(OwnersRouter)
    router._replica_queue_len_cache = ReplicaQueueLengthCache()
    router.initialize_state()
    base = RequestRouter.update_replicas
    RequestRouter.update_replicas = lambda _self, _replicas: None
    yield router
    RequestRouter.update_replicas = base


def replica(name: str, *digests: str) -> SimpleNamespace:
    from ray.serve._private.common import DeploymentID, ReplicaID

    stats = {"digests": digests, "batch": 1} if digests else {}
    return SimpleNamespace(replica_id=ReplicaID(name, DeploymentID("worker")), routing_stats=stats)


def call(digest: str = "") -> SimpleNamespace:
    class Pending(SimpleNamespace):  # unlike its base it can be referred to weakly
        pass

    metadata = SimpleNamespace(session_id=digest, internal_request_id="the same for all")
    return Pending(metadata=metadata, routing_context=SimpleNamespace(should_backoff=False), future=asyncio.Future())


def test_the_router_asks_owners_first_then_everybody(router) -> None:
    async def use():
        replicas = [replica(f"w{i}") for i in range(5)]
        router.update_replicas(replicas)
        digest = DIGESTS[7]
        first, second = Owners({r.replica_id: r.replica_id.unique_id for r in replicas}).of(digest)
        asked = await router.choose_replicas(replicas, call(digest))
        assert [r.replica_id for r in asked[0]] == [first]
        assert sorted(r.replica_id.unique_id for rank in asked for r in rank) == ["w0", "w1", "w2", "w3", "w4"]
        router.replica_queue_len_cache.update(first, 1)
        assert (await router.choose_replicas(replicas, call(digest)))[0][0].replica_id == second
        holder = [replica(r.replica_id.unique_id, *([digest[:16]] if r.replica_id == first else [])) for r in replicas]
        router.update_replicas(holder)
        assert (await router.choose_replicas(holder, call(digest)))[0][0].replica_id == first
        left = [r for r in holder if r.replica_id != first]  # it has just died, and nobody has told the router
        assert first not in {r.replica_id for rank in await router.choose_replicas(left, call(digest)) for r in rank}
        assert await router.choose_replicas(replicas, call()) == [replicas]
        assert await router.choose_replicas([], call(digest)) == [[]]

    asyncio.run(use())


def test_where_an_owner_cannot_load_an_adapter_only_those_that_hold_it_are_asked(router) -> None:
    async def use():
        digest = "d" * 64
        replicas = [replica("w0"), replica("w1", digest[:16]), replica("w2", "e" * 16)]
        router.update_replicas(replicas)
        assert await router.choose_replicas(replicas, call(digest + WARM)) == [[replicas[1]]]
        nobody = await router.choose_replicas([replicas[0], replicas[2]], call(digest + WARM))
        assert nobody == await router.choose_replicas([replicas[0], replicas[2]], call(digest))

    asyncio.run(use())


def test_calls_of_one_http_request_are_told_apart(router) -> None:
    """They share Serve's `internal_request_id`."""

    async def use():
        replicas = [replica("w0"), replica("w1")]
        router.update_replicas(replicas)
        one, other = call(DIGESTS[0]), call(DIGESTS[1])
        for pending in (one, other):
            await router.choose_replicas(replicas, pending)
        matching = router._get_pending_request_matching_internal_request_id
        assert matching(other.metadata) is other
        assert matching(one.metadata) is one
        assert matching(one.metadata) is matching(None) is None
        await router.choose_replicas(replicas, one)
        one.future.cancel()
        assert matching(one.metadata) is None

    asyncio.run(use())


def test_among_many_workers_a_call_looks_at_a_sample(router) -> None:
    async def use():
        replicas = [replica(f"w{i}") for i in range(200)]
        router.update_replicas(replicas)
        asked = await router.choose_replicas(replicas, call(DIGESTS[0]))
        assert asked[0][0].replica_id == router._owners.of(DIGESTS[0])[0]
        assert 32 <= sum(map(len, asked)) <= 34

    asyncio.run(use())


def test_ours_has_neither_the_hot_spot_of_hashing_nor_the_cold_of_chance() -> None:
    """The benchmark's own simulation, shorter; the same seed, so the same figures everywhere."""
    from benchmarks.routing import HashRouter, OursRouter, RandomRouter, simulate

    hashed, random, ours = (simulate(router(), 8, calls=6000) for router in (HashRouter, RandomRouter, OursRouter))
    assert ours.p99 < 1.5 * random.p99 < hashed.p99 / 5
    assert random.hits + 0.08 < ours.hits < hashed.hits
