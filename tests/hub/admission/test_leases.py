"""Arithmetic of leases, with a fake clock."""

from itertools import count

import pytest

from hub.admin_schemas import TenantLimits
from hub.admission.leases import Amounts, Lease, Refusal, wanted

LIMITS = TenantLimits(requests_per_second=20, images_per_second=10, images_in_flight=40)


def approximately(seconds: float) -> float:
    """Return a value that equals a float up to rounding."""
    approximate: float = pytest.approx(seconds)  # type: ignore[assignment]  # compares like a float
    return approximate


class Clock:
    """Clock that a test sets, in seconds."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_lot_covers_a_twentieth_of_a_second_and_a_sixteenth_of_the_permits() -> None:
    limits = TenantLimits(requests_per_second=200, images_per_second=1000, images_in_flight=1024)
    assert wanted(Amounts(1, 0, 0), limits) == Amounts(10, 0, 0)
    assert wanted(Amounts(0, 3, 3), limits) == Amounts(0, 50, 64)
    assert wanted(Amounts(0, 60, 70), limits) == Amounts(0, 60, 70)


def test_lease_is_short_of_exactly_what_a_call_needs() -> None:
    lease = Lease("now")
    assert lease.missing(1, 0) == Amounts(1, 0, 0)
    assert lease.missing(0, 3) == Amounts(0, 3, 3)
    lease.add(Amounts(1, 2, 5))
    assert lease.covers(1, 2)
    assert not lease.covers(1, 3)
    assert lease.missing(1, 4) == Amounts(0, 2, 0)


def test_images_in_flight_use_permits_until_they_end() -> None:
    lease = Lease("now")
    lease.add(Amounts(0, 10, 4))
    lease.start_images(3)
    assert lease.missing(0, 2) == Amounts(0, 0, 1)
    lease.end_images(3)
    assert lease.covers(0, 4)


def test_debt_of_a_large_call_is_paid_by_the_next_lot() -> None:
    lease = Lease("now")
    lease.add(Amounts(0, 10, 30))
    lease.start_images(30)
    lease.end_images(30)
    assert lease.missing(0, 1) == Amounts(0, 21, 0)


def test_settlement_returns_unused_permits_and_keeps_the_peak() -> None:
    lease, numbers = Lease("now"), count(1)
    lease.touch()
    lease.add(Amounts(2, 20, 16))
    lease.spend_request()
    lease.start_images(5)
    lease.end_images(2)
    first = lease.settle(lambda: next(numbers))
    assert (first.permits, first.in_flight, first.batch) == (5, 3, 1)
    assert first.counts == {"requests": 1, "images": 5}
    lease.confirm()
    lease.end_images(3)
    assert lease.settle(lambda: next(numbers)).permits == 3  # the peak since the settlement before
    lease.confirm()
    assert lease.settle(lambda: next(numbers)).permits == 0


def test_tokens_lapse_when_the_lease_is_idle_for_one_interval() -> None:
    lease, numbers = Lease("now"), count(1)
    lease.touch()
    lease.add(Amounts(5, 5, 5))
    lease.settle(lambda: next(numbers))
    lease.confirm()
    assert lease.covers(5, 0)
    assert not lease.disposable
    lease.settle(lambda: next(numbers))
    assert not lease.disposable  # not confirmed
    lease.confirm()
    assert not lease.covers(1, 0)
    assert lease.disposable
    lease.touch()
    assert not lease.disposable


def test_unconfirmed_batch_is_sent_again_with_the_same_number() -> None:
    lease, numbers = Lease("now"), count(1)
    lease.spend_request()
    first = lease.settle(lambda: next(numbers))
    lease.count_refusal()
    again = lease.settle(lambda: next(numbers))
    assert (again.batch, again.counts) == (first.batch, first.counts) == (1, {"requests": 1})
    lease.confirm()
    third = lease.settle(lambda: next(numbers))
    assert (third.batch, third.counts) == (2, {"refused": 1})


def test_gateway_without_redis_enforces_the_whole_rate_by_itself() -> None:
    clock = Clock()
    lease = Lease("now", clock)
    admitted = 0
    for _ in range(200):  # two seconds
        if lease.covers(1, 0) or lease.refill_alone(LIMITS, 1, 0) is None:
            lease.spend_request()
            admitted += 1
        clock.now_s += 0.01
    assert admitted == pytest.approx(20 + 2 * 20, abs=1)  # a full bucket and the rate


def test_gateway_without_redis_says_how_long_to_wait() -> None:
    clock = Clock()
    lease = Lease("now", clock)
    assert lease.refill_alone(LIMITS, 0, 30) is None  # waits for a full bucket only
    lease.start_images(30)
    assert lease.refill_alone(LIMITS, 0, 1) == Refusal("images_per_second", approximately(2.1))
    clock.now_s += 2.15
    assert lease.refill_alone(LIMITS, 0, 1) is None
    assert lease.refill_alone(LIMITS, 0, 2) == Refusal("images_per_second", approximately(0.05))


def test_gateway_without_redis_bounds_images_in_flight() -> None:
    clock = Clock()
    lease = Lease("now", clock)
    for _ in range(4):
        assert lease.refill_alone(LIMITS, 0, 10) is None
        lease.start_images(10)
        clock.now_s += 1
    assert lease.refill_alone(LIMITS, 0, 1) == Refusal("images_in_flight", 1.0)


def test_gateway_starts_with_a_full_bucket_at_each_outage() -> None:
    clock = Clock()
    lease = Lease("now", clock)
    assert lease.refill_alone(LIMITS, 1, 0) is None
    for _ in range(20):
        lease.spend_request()
    assert lease.refill_alone(LIMITS, 1, 0) == Refusal("requests_per_second", approximately(0.05))
    lease.add(Amounts(0, 0, 0))  # Redis answered
    assert lease.refill_alone(LIMITS, 1, 0) is None
