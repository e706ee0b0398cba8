"""Calls from a gateway to workers: retries, fallbacks, timeouts, and workers that are not there."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import ray.exceptions

from hub.cluster import gateway
from hub.cluster.gateway import MAX_ATTEMPTS, ServeWorkers
from hub.cluster.rendezvous import RESIDENT_ONLY
from hub.errors import InvalidAdapter, Unavailable

DIED = ray.exceptions.ActorDiedError(), ray.exceptions.ActorUnavailableError("gone", None)


class Handle:
    """Deployment handle whose calls end one after another with the given outcomes; None: never."""

    def __init__(self, *outcomes: object, raises: bool = True) -> None:
        """
        Args:
            raises: an outcome that is an error is raised; otherwise it is the call's result, as workers return errors.
        """
        self.outcomes = list(outcomes)
        self.raises = raises
        self.calls = 0
        self.session_ids: list[str] = []

    def options(self, *, session_id: str) -> "Handle":
        self.session_ids.append(session_id)
        return self

    def __getattr__(self, _method: str) -> "Handle":
        return self

    def remote(self, *_arguments: object) -> "asyncio.Future[object]":
        self.calls += 1
        future: asyncio.Future[object] = asyncio.get_running_loop().create_future()
        outcome = self.outcomes.pop(0)
        if self.raises and isinstance(outcome, Exception):
            future.set_exception(outcome)
        elif outcome is not None:
            future.set_result(outcome)
        return future


def called(handle: Handle, call: Callable[[ServeWorkers], Awaitable[Any]], scale_to_zero: bool = False) -> Any:
    """Return the result of a call through `ServeWorkers`."""
    stand_in: Any = handle

    async def run() -> Any:
        return await call(ServeWorkers(stand_in, scale_to_zero))

    return asyncio.run(run())


async def classify(workers: ServeWorkers) -> Any:
    return await workers.classify("tenant", "d", [], 1.0)


async def limits_twice(workers: ServeWorkers) -> Any:
    return [await workers.limits(), await workers.limits()]


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway, "RETRY_PAUSE_S", 0.0)


def test_a_call_is_repeated_when_its_worker_dies() -> None:
    assert called(Handle(*DIED, ["answer"]), classify) == ["answer"]


def test_a_call_fails_when_workers_die_at_every_attempt() -> None:
    handle = Handle(*DIED, *DIED)
    with pytest.raises(Unavailable, match="died"):
        called(handle, classify)
    assert handle.calls == MAX_ATTEMPTS == 3


def test_a_call_is_not_repeated_when_a_worker_raises_an_error_of_the_hub() -> None:
    handle = Handle(Unavailable("the store is away"), "never")
    with pytest.raises(Unavailable, match="store"):
        called(handle, classify)
    assert handle.calls == 1


def test_a_call_goes_to_a_worker_that_holds_the_adapter_when_the_first_cannot_load_it() -> None:
    handle = Handle(Unavailable("the store is away"), ["answer"], raises=False)
    assert called(handle, classify) == ["answer"]
    assert handle.session_ids == ["d", "d" + RESIDENT_ONLY]


def test_a_call_fails_when_no_worker_can_load_the_adapter() -> None:
    away = Unavailable("the store is away")
    with pytest.raises(Unavailable, match="store is away"):
        called(Handle(away, away, raises=False), classify)


def test_a_call_fails_at_once_when_the_adapter_is_invalid() -> None:
    handle = Handle(InvalidAdapter("it does not fit"), "never", raises=False)
    with pytest.raises(InvalidAdapter):
        called(handle, classify)
    assert handle.calls == 1


def test_readiness_asks_a_worker_every_time() -> None:
    assert called(Handle("a", "b"), limits_twice) == ["a", "b"]


def test_readiness_asks_once_when_the_hub_scales_to_zero() -> None:
    assert called(Handle("a"), limits_twice, scale_to_zero=True) == ["a", "a"]


@pytest.mark.parametrize(("scale_to_zero", "timeout"), [(False, "READY_TIMEOUT_S"), (True, "COLD_START_TIMEOUT_S")])
def test_readiness_fails_when_no_worker_answers_in_time(
    scale_to_zero: bool, timeout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway, timeout, 0.01)
    with pytest.raises(Unavailable, match="No worker answers"):
        called(Handle(None), limits_twice, scale_to_zero)
