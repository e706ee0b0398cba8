"""The simulated cluster against what is known on paper, and against the hub's own code."""

import dataclasses
import math
from collections import OrderedDict
from typing import Any, Literal

import numpy as np
import pytest

from benchmarks.cluster_engine import Cluster, Cores
from benchmarks.cluster_model import (
    Callers,
    Scaling,
    Times,
    Traffic,
    che_hit_rate,
    digests,
    in_line,
    lru_hit_rate,
    zipf,
)
from benchmarks.cluster_routing import POLICIES, Router
from hub.cluster.rendezvous import RendezvousHash, hash64, rank_workers

pytestmark = pytest.mark.slow

PLAIN = Times(pass_s=0.0, image_s=0.01, batch_size=1, batch_wait_s=0.0, slots=10)


def poisson(rate: float, count: int, adapters: int = 1, exponent: float = 0.0, seed: int = 0) -> Traffic:
    rng = np.random.default_rng(seed)
    drawn = rng.choice(adapters, count, p=zipf(adapters, exponent))
    return Traffic(np.cumsum(rng.exponential(1 / rate, count)), drawn)


@dataclasses.dataclass
class Holder:
    """A worker with these adapters in its slots."""

    slots: set[int]


def cluster(
    times: Times = PLAIN, workers: int = 1, policy: str = "owners by call", adapters: int = 10, **more: Any
) -> Cluster:
    return Cluster(times, workers, policy, digests(adapters), **more)


@pytest.mark.parametrize("load", [0.3, 0.5, 0.8])
def test_a_worker_with_batches_of_one_is_an_m_d_1_queue(load: float) -> None:
    traffic = poisson(load / 0.01, 200_000)
    one = cluster()
    one.fill(np.array([0]))
    result = one.run(traffic)
    expected_ms = 10 * (1 + load / (2 * (1 - load)))  # Pollaczek and Khinchine
    assert result.mean_ms == pytest.approx(expected_ms, rel=0.03)
    assert result.utilisation == pytest.approx(load, rel=0.02)
    assert result.hit_rate == 1


@pytest.mark.parametrize("servers", [1, 3])
def test_the_line_in_front_of_gateways_is_first_come_first_served(servers: int) -> None:
    times = poisson(250 * servers, 500).times
    free = [0.0] * servers
    expected = []
    for at in times.tolist():
        first = free.index(min(free))
        free[first] = max(at, free[first]) + 0.003
        expected.append(free[first])
    assert in_line(times, 0.003, servers) == pytest.approx(expected)


def test_shared_cores_give_each_job_its_share() -> None:
    cores = Cores(2)
    for i, cpu_s in enumerate((1.0, 1.0, 2.0)):
        cores.add(0.0, cpu_s, (i, 0, 0))
    ends = []
    while cores.next_s() < math.inf:
        at = cores.next_s()
        ends.append((round(at, 6), cores.pop()[0]))
    assert ends == [(1.5, 0), (1.5, 1), (2.5, 2)]  # three share two cores, then the last has one to itself


def test_callers_on_a_busy_worker_get_what_it_can_do() -> None:
    times = dataclasses.replace(PLAIN, batch_size=8, pass_s=0.01)
    one = cluster(times, adapters=3)
    one.fill(np.arange(3))
    result = one.run(Callers(16, [0, 1, 2], seconds=60), warm_up_s=10)
    assert result.images_a_pass == pytest.approx(8, rel=0.02)
    assert result.per_second == pytest.approx(8 / 0.09, rel=0.03)
    assert result.mean_ms / 1e3 * result.per_second == pytest.approx(16, rel=0.03)  # Little


@pytest.mark.parametrize("slots", [5, 20])
def test_hit_rates_are_those_of_a_direct_count(slots: int) -> None:
    traffic = poisson(20, 20_000, adapters=100, exponent=1.0)
    one = cluster(dataclasses.replace(PLAIN, slots=slots, host_load_s=0, store_load_s=0), adapters=100)
    result = one.run(traffic)
    assert result.hit_rate == pytest.approx(lru_hit_rate(traffic.adapters.tolist(), slots), abs=0.01)
    assert che_hit_rate(zipf(100, 1.0), slots) == pytest.approx(result.hit_rate, abs=0.02)


def test_a_counted_hit_rate_can_be_followed_by_hand() -> None:
    assert lru_hit_rate([1, 2, 1, 3, 2, 1], 2) == pytest.approx(1 / 6)
    assert lru_hit_rate([1, 1, 1, 1], 1, skip=1) == 1


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("gateways", [0, 5])
def test_every_call_is_answered_once_and_nothing_stays(policy: str, gateways: int) -> None:
    times = dataclasses.replace(PLAIN, batch_size=4, slots=3, host_adapters=5)
    traffic = poisson(600, 5_000, adapters=50, exponent=0.8)
    some = cluster(times, 8, policy, adapters=50, gateways=gateways)
    result = some.run(traffic)
    assert result.calls == len(traffic.times)
    assert result.took_s.min() > 0.0099
    assert sum(worker.images for worker in some.workers) == result.calls
    assert not any(some.router.loads)
    for worker in some.workers:
        assert not worker.queue
        assert not worker.loading
        assert not any(worker.slots.values())
        assert len(worker.slots) <= 3
        assert len(worker.host) <= 5


@pytest.mark.parametrize("policy", POLICIES)
def test_the_seed_decides_everything(policy: str) -> None:
    def once(seed: int) -> np.ndarray:
        some = cluster(dataclasses.replace(PLAIN, slots=2), 5, policy, adapters=40, gateways=3, seed=seed)
        return some.run(poisson(300, 2_000, adapters=40, exponent=1.0, seed=seed)).took_s

    assert np.array_equal(once(1), once(1))
    assert not np.array_equal(once(1), once(2))


def test_owners_are_those_of_the_hub() -> None:
    names = [f"worker-{i}" for i in range(9)]
    files = [f"{i:064x}" for i in range(300)]
    router = Router("owners by call", np.array([hash64(d) for d in files], np.uint64), gateways=0, seed=0)
    router.join(range(9), np.array([hash64(name) for name in names], np.uint64))
    known = RendezvousHash(dict(enumerate(names)))
    assert [router.owners(i) for i in range(300)] == [known.owners(digest) for digest in files]


@pytest.mark.parametrize(("policy", "batch"), [("owners by call", 1), ("owners by batch", 4)])
def test_choices_are_those_of_the_hub(policy: str, batch: int) -> None:
    rng = np.random.default_rng(0)
    spilled = 0
    for round in range(300):
        workers = [Holder(set(rng.choice(20, 4).tolist())) for _ in range(6)]
        router = Router(policy, digests(20), gateways=0, seed=0, batch=4)
        router.join(range(6), digests(6, seed=round))
        router.loads = rng.integers(0, 9, 6).tolist()
        loads, adapter = dict(enumerate(router.loads)), round % 20
        resident = {i for i, worker in enumerate(workers) if adapter in worker.slots}
        expected = rank_workers(router.owners(adapter), loads, resident, batch)[0]
        assert router.send(adapter, 0.0, workers) == (expected, -1)
        spilled += router.spilled
    assert spilled


def test_a_gateway_that_is_not_told_who_holds_an_adapter_asks_its_first_owner() -> None:
    for told in (True, False):
        router = Router("owners by batch", digests(1), gateways=0, seed=0, batch=32, told=told)
        router.join(range(4), digests(4))
        router.loads = [0] * 4
        first, second = router.owners(0)
        workers = [Holder({0} if i == second else set()) for i in range(4)]
        assert router.send(0, 0.0, workers)[0] == (second if told else first)


def test_a_gateway_knows_what_it_sent_and_forgets_it() -> None:
    router = Router("two choices", digests(1), gateways=1, seed=0)
    router.join(range(2), digests(2))
    router.loads = [0, 0]
    sent = [router.send(0, 0.0, [])[0] for _ in range(40)]
    assert min(sent.count(0), sent.count(1)) > 10
    for worker in sent:
        router.done(worker, 0, 1.0)
    assert router.loads == [0, 0]


def test_a_policy_that_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match="'nearest' is none of owners by call, owners by batch"):
        Router("nearest", digests(1), gateways=0, seed=0)


def test_a_batch_is_short_where_passes_count() -> None:
    router = Router("owners by batch", digests(1), gateways=0, seed=0, batch=32)
    router.join(range(4), digests(4))
    router.loads = [0] * 4
    workers = [Holder(set()) for _ in range(4)]
    first, second = router.owners(0)
    sent = [router.send(0, 0.0, workers)[0] for _ in range(65)]
    assert sent[:64] == [first] * 32 + [second] * 32
    assert sent[64] not in (first, second)


def test_a_call_goes_where_its_adapter_is_held() -> None:
    router = Router("owners by batch", digests(1), gateways=0, seed=0, batch=32)
    router.join(range(4), digests(4))
    router.loads = [10] * 4
    second = router.owners(0)[1]
    workers = [Holder({0} if i == second else set()) for i in range(4)]
    assert router.send(0, 0.0, workers)[0] == second


@pytest.mark.parametrize("policy", ["owners by call", "ring"])
def test_a_worker_that_comes_takes_its_share_and_moves_no_other(policy: str) -> None:
    router = Router(policy, digests(5_000), gateways=0, seed=0)
    seeds = digests(10, seed=3)
    router.join(range(9), seeds[:9])
    before = [router.homes(i)[0] for i in range(5_000)]
    router.join(range(10), seeds)
    after = [router.homes(i)[0] for i in range(5_000)]
    moved = [new for old, new in zip(before, after, strict=True) if new != old]
    assert set(moved) == {9}
    assert len(moved) == pytest.approx(500, rel=0.35)


def test_a_full_cluster_has_what_is_popular_at_home() -> None:
    some = cluster(dataclasses.replace(PLAIN, slots=2, host_adapters=4), 5, adapters=100)
    some.fill(np.arange(100))
    for i, worker in enumerate(some.workers):
        assert all(some.router.homes(adapter)[0] == i for adapter in worker.slots)
        assert all(i in some.router.homes(adapter) for adapter in worker.host)
        assert (len(worker.slots), len(worker.host)) == (2, 4)
        assert isinstance(worker.slots, OrderedDict)


@pytest.mark.parametrize(("signal", "target"), [("passes", 2), ("work", 0.7)])
def test_workers_come_with_load_and_go_without_it(signal: Literal["passes", "work"], target: float) -> None:
    times = dataclasses.replace(PLAIN, start_s=5.0)
    scaling = Scaling(1, 6, target, signal, look_back_s=5, up_s=3, down_s=20)
    rng = np.random.default_rng(0)
    quiet, busy = rng.uniform(0, 400, 4_000), rng.uniform(100, 200, 25_000)
    at = np.sort(np.concatenate([quiet, busy]))
    some = cluster(times, 1, adapters=10, scaling=scaling)
    result = some.run(Traffic(at, rng.integers(0, 10, len(at))))
    counts = [count for _, count in result.workers]
    assert max(counts) >= 3
    assert counts[-1] == 1
    first = next(second for second, count in result.workers if count > 1)
    assert 108 <= first <= 125  # the burst, the delay, the start
    assert result.calls == len(at)
