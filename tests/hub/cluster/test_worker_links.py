"""Calls that a gateway sends together: when they leave, and that each keeps its own answer, error and cancellation."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import numpy as np
import pytest
import ray.exceptions

from hub.cluster import gateway, worker_links
from hub.cluster.gateway import ServeWorkers
from hub.cluster.rendezvous import WorkerReport, known_workers
from hub.cluster.request_router import PINNED
from hub.cluster.worker_links import WorkerLinks
from hub.errors import InvalidAdapter, Unavailable
from hub.observability import request_context
from hub.observability.request_context import RequestContext
from hub.worker_api import MAX_SEND_BYTES, CallFailed

DIED = ray.exceptions.ActorDiedError()


class Response:
    """Response of Serve to a send; the test answers it."""

    def __init__(self) -> None:
        self.items: asyncio.Queue[object] = asyncio.Queue()
        self.cancelled = False

    def __await__(self) -> Any:
        return self._next().__await__()

    async def _next(self) -> Any:
        item = await self.items.get()
        if isinstance(item, Exception):
            raise item
        return item

    async def __aiter__(self) -> AsyncIterator[Any]:
        while (item := await self._next()) is not None:
            yield item

    def cancel(self) -> None:
        self.cancelled = True
        self.items.put_nowait(ray.exceptions.TaskCancelledError())


class Deployment:
    """Handle of the workers, which records each send: the method, its argument, the worker, and the response."""

    def __init__(self) -> None:
        self.sends: list[tuple[str, Any, str, Response]] = []

    def options(self, **options: Any) -> "_Method":
        return _Method(self, **options)

    async def next(self, count: int = 1) -> list[tuple[str, Any, str, Response]]:
        """Return the next sends when they are there."""
        while len(self.sends) < count:
            await asyncio.sleep(0.001)
        taken, self.sends = self.sends[:count], self.sends[count:]
        return taken


class _Method:
    def __init__(self, deployment: Deployment, name: str = "", session_id: str = "", stream: bool = False) -> None:
        self._deployment, self._name, self._session_id = deployment, name, session_id

    def options(self, stream: bool) -> "_Method":
        return self

    def __getattr__(self, name: str) -> "_Method":
        return _Method(self._deployment, name, self._session_id)

    def remote(self, *arguments: Any) -> Response:
        response = Response()
        argument = arguments[0] if self._name != "answer" else arguments
        self._deployment.sends.append((self._name, argument, self._session_id, response))
        return response


@pytest.fixture(autouse=True)
def two_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway, "RETRY_PAUSE_S", 0.0)
    monkeypatch.setattr(worker_links, "PAUSE_S", 60.0)  # no test waits for it
    known_workers().update([WorkerReport("w0", batch=64), WorkerReport("w1", batch=64)])


def run(use: Callable[[Deployment, ServeWorkers], Awaitable[None]]) -> None:
    async def limited() -> None:
        deployment: Any = Deployment()
        async with asyncio.timeout(20):
            await use(deployment, ServeWorkers(deployment))

    asyncio.run(limited())


def start(workers: ServeWorkers, name: str, tenant: str = "t", images: int = 1, side: int = 1) -> "asyncio.Task[Any]":
    """Start a call; its digest does not matter, but for its worker."""
    pixels = [np.zeros((3, side, side), np.uint8)] * images
    return asyncio.create_task(workers.classify(tenant, name, pixels, 1.0))


async def several_under_way(
    deployment: Deployment, workers: ServeWorkers, count: int = 3
) -> tuple[list["asyncio.Task[Any]"], dict[str, str], Response]:
    """Return calls that left together behind a first one, with their ids and their response."""
    first = start(workers, "same")
    ((_, _, _, alone),) = await deployment.next()
    calls = [start(workers, "same", tenant=f"t{i}") for i in range(count)]
    await asyncio.sleep(0.01)
    alone.items.put_nowait(["first"])
    assert await first == ["first"]
    ((method, argument, _, response),) = await deployment.next()
    assert method == "answer_together"
    ids = {arguments[0]: id for id, arguments in argument.items()}
    return calls, ids, response


def set_waits(monkeypatch: pytest.MonkeyPatch, *, longest_s: float) -> None:
    """Let calls wait for each other for `longest_s`, however quick the answers were, and for nothing else."""
    monkeypatch.setattr(worker_links, "PAUSE_S", 0.0)
    monkeypatch.setattr(worker_links, "WAIT_SHARE", 1e6)
    monkeypatch.setattr(worker_links, "LONGEST_WAIT_S", longest_s)


async def busy_worker(deployment: Deployment, workers: ServeWorkers, calls: int) -> list["asyncio.Task[Any]"]:
    """Return calls without an answer, at a worker that has answered before: the link then knows how long it takes."""
    first = start(workers, "d")
    ((_, _, _, response),) = await deployment.next()
    response.items.put_nowait(["first"])
    await first
    slow = [start(workers, "d") for _ in range(calls)]
    await deployment.next()
    return slow


def test_a_call_leaves_alone_and_at_once_when_its_worker_has_nothing() -> None:
    async def use(deployment: Deployment, workers: ServeWorkers) -> None:
        for _ in range(3):
            call = start(workers, "d")
            ((method, arguments, session_id, response),) = await deployment.next()
            assert (method, arguments[:2]) == ("answer", ("t", "d"))
            assert session_id in (f"{PINNED}w0", f"{PINNED}w1")
            response.items.put_nowait(["answer"])
            assert await call == ["answer"]

    run(use)


def test_calls_that_come_while_one_is_under_way_leave_together_with_its_answer() -> None:
    async def use(deployment: Deployment, workers: ServeWorkers) -> None:
        calls, ids, response = await several_under_way(deployment, workers)
        assert not deployment.sends
        response.items.put_nowait((3, {ids["t1"]: ["b"]}))
        assert await calls[1] == ["b"]
        response.items.put_nowait((2, {ids["t0"]: ["a"], ids["t2"]: ["c"]}))
        response.items.put_nowait(None)
        assert [await call for call in calls] == [["a"], ["b"], ["c"]]

    run(use)


def test_a_call_leaves_beside_one_that_takes_long_when_the_pause_has_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_links, "PAUSE_S", 0.02)

    async def use(deployment: Deployment, workers: ServeWorkers) -> None:
        slow = start(workers, "d")
        await deployment.next()
        quick = start(workers, "d")
        ((_, _, _, response),) = await deployment.next()
        response.items.put_nowait(["quick"])
        assert await quick == ["quick"]
        assert not slow.done()
        slow.cancel()

    run(use)


def test_calls_wait_for_each_other_when_the_worker_takes_long_to_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A send costs more than a call; a busy worker would only queue the first of them."""
    set_waits(monkeypatch, longest_s=0.3)

    async def use(deployment: Deployment, workers: ServeWorkers) -> None:
        slow = await busy_worker(deployment, workers, calls=3)
        calls = [start(workers, "d")]
        await asyncio.sleep(0.02)
        calls.append(start(workers, "d"))
        ((method, argument, _, response),) = await deployment.next()
        assert (method, len(argument)) == ("answer_together", 2)
        response.items.put_nowait((1, {id: [id] for id in argument}))
        response.items.put_nowait(None)
        assert [await call for call in calls] == [[id] for id in argument]
        for call in slow:
            assert not call.done()
            call.cancel()

    run(use)


@pytest.mark.parametrize(
    ("decode_s", "tenant", "together"), [(0.0, "t", [2, 1]), (1.0, "t", [3]), (1.0, "alone", [2, 1])]
)
def test_sends_are_farther_apart_when_decodes_take_long_but_for_a_tenant_with_nothing_at_the_worker(
    decode_s: float, tenant: str, together: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each send costs time of a gateway that has too much to do. Otherwise calls leave as soon as as many wait."""
    set_waits(monkeypatch, longest_s=0.3)

    async def use(deployment: Deployment, workers: ServeWorkers) -> None:
        (slow,) = await busy_worker(deployment, workers, calls=1)
        with request_context.use(RequestContext("id")):
            request_context.note_times(decode=decode_s)
            calls = [start(workers, "d", tenant) for _ in range(2)]
            await asyncio.sleep(0.02)
            calls.append(start(workers, "d", tenant))
        sends = await deployment.next(len(together))
        assert [len(argument) if name == "answer_together" else 1 for name, argument, _, _ in sends] == together
        for call in (slow, *calls):
            call.cancel()

    run(use)


@pytest.mark.parametrize(
    ("under_way", "tenant"),
    [
        # Otherwise the calls of a busy tenant would delay one that sends a call at a time.
        pytest.param(3, "other", id="a call of a tenant without a call there"),
        # Otherwise the first call after a pass of all would be computed alone, and the others only after it.
        pytest.param(2, "t", id="as many calls as the worker has"),
    ],
)
def test_waiting_calls_leave_soon_when_there_is_one_more(
    under_way: int, tenant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_waits(monkeypatch, longest_s=60.0)

    async def use(deployment: Deployment, workers: ServeWorkers) -> None:
        slow = await busy_worker(deployment, workers, calls=under_way)
        waiting = start(workers, "d")
        await asyncio.sleep(0.02)
        assert not deployment.sends
        more = start(workers, "d", tenant=tenant)
        ((method, argument, _, _),) = await deployment.next()
        assert (method, len(argument)) == ("answer_together", 2)
        for call in (*slow, waiting, more):
            call.cancel()

    run(use)


def test_calls_of_one_round_of_the_event_loop_leave_together() -> None:
    async def use(deployment: Deployment, workers: ServeWorkers) -> None:
        calls = [start(workers, "d") for _ in range(4)]
        ((_, argument, _, response),) = await deployment.next()
        response.items.put_nowait((0, {id: [id] for id in argument}))
        response.items.put_nowait(None)
        assert [await call for call in calls] == [[id] for id in argument]

    run(use)


def test_neighbours_are_answered_when_a_call_is_cancelled() -> None:
    async def use(deployment: Deployment, workers: ServeWorkers) -> None:
        calls, ids, response = await several_under_way(deployment, workers)
        calls[1].cancel()
        ((method, argument, _, _),) = await deployment.next()
        assert (method, argument) == ("forget", [ids["t1"]])
        response.items.put_nowait((2, {ids["t0"]: ["a"], ids["t2"]: ["c"]}))
        response.items.put_nowait((0, {}))
        response.items.put_nowait(None)
        await asyncio.wait(calls)
        assert (calls[0].result(), calls[1].cancelled(), calls[2].result()) == (["a"], True, ["c"])
        assert not response.cancelled
        await asyncio.sleep(0)
        again = start(workers, "same")
        ((_, _, session_id, response),) = await deployment.next()
        assert session_id.startswith(PINNED)  # the worker counts as alive
        response.items.put_nowait(["again"])
        assert await again == ["again"]

    run(use)


def test_a_send_is_cancelled_when_all_of_its_calls_are() -> None:
    async def use(deployment: Deployment, workers: ServeWorkers) -> None:
        calls, ids, response = await several_under_way(deployment, workers)
        response.items.put_nowait((3, {ids["t1"]: ["b"]}))
        await calls[1]
        for call in (calls[0], calls[2]):
            call.cancel()
        await asyncio.wait(calls)
        assert response.cancelled

    run(use)


def test_a_call_is_not_sent_when_it_is_cancelled_before_its_turn() -> None:
    async def use(deployment: Deployment, workers: ServeWorkers) -> None:
        first = start(workers, "d")
        ((_, _, _, response),) = await deployment.next()
        gone, stays = start(workers, "d", "gone"), start(workers, "d", "stays")
        await asyncio.sleep(0.01)
        gone.cancel()
        response.items.put_nowait(["first"])
        await first
        ((method, arguments, _, response),) = await deployment.next()
        assert (method, arguments[0]) == ("answer", "stays")
        response.items.put_nowait(["answer"])
        assert await stays == ["answer"]

    run(use)


def test_neighbours_are_answered_when_a_call_has_an_error() -> None:
    async def use(deployment: Deployment, workers: ServeWorkers) -> None:
        calls, ids, response = await several_under_way(deployment, workers)
        found = {ids["t0"]: InvalidAdapter("does not fit"), ids["t1"]: CallFailed("a fault"), ids["t2"]: ["c"]}
        response.items.put_nowait((0, found))
        response.items.put_nowait(None)
        with pytest.raises(InvalidAdapter):
            await calls[0]
        with pytest.raises(CallFailed):
            await calls[1]
        assert await calls[2] == ["c"]

    run(use)


def test_each_call_without_an_answer_is_repeated_when_their_worker_dies() -> None:
    async def use(deployment: Deployment, workers: ServeWorkers) -> None:
        calls, ids, response = await several_under_way(deployment, workers)
        response.items.put_nowait((3, {ids["t1"]: ["b"]}))
        await calls[1]
        response.items.put_nowait(DIED)
        ((method, argument, session_id, response),) = await deployment.next()
        assert (method, len(argument)) == ("answer_together", 2)
        response.items.put_nowait((0, {id: [arguments[0]] for id, arguments in argument.items()}))
        response.items.put_nowait(None)
        assert [await call for call in calls] == [["t0"], ["b"], ["t2"]]
        assert session_id.startswith(PINNED)

    run(use)


def test_calls_are_refused_when_workers_die_at_every_attempt() -> None:
    async def use(deployment: Deployment, workers: ServeWorkers) -> None:
        calls, _, response = await several_under_way(deployment, workers, 2)
        response.items.put_nowait(DIED)
        ((_, _, _, response),) = await deployment.next()  # to the other worker
        response.items.put_nowait(DIED)
        last = await deployment.next(2)  # no worker is known to live: by Serve's own routing
        for method, _, session_id, response in last:
            assert (method, session_id) == ("answer", "same")
            response.items.put_nowait(DIED)
        for call in calls:
            with pytest.raises(Unavailable, match="died"):
                await call

    run(use)


def test_calls_are_repeated_when_their_worker_ends_without_an_answer() -> None:
    async def use(deployment: Deployment, workers: ServeWorkers) -> None:
        calls, _, response = await several_under_way(deployment, workers, 2)
        response.items.put_nowait(None)
        ((_, argument, _, response),) = await deployment.next()
        response.items.put_nowait((0, {id: ["late"] for id in argument}))
        response.items.put_nowait(None)
        assert [await call for call in calls] == [["late"], ["late"]]

    run(use)


def test_a_modest_tenant_is_in_the_next_send_when_a_greedy_one_fills_several() -> None:
    async def use(deployment: Deployment, workers: ServeWorkers) -> None:
        first = start(workers, "d")
        ((_, _, _, response),) = await deployment.next()
        side = int((MAX_SEND_BYTES / 3 / 4) ** 0.5)  # four of them fill a send
        calls = [start(workers, "d", "greedy", side=side) for _ in range(12)]
        await asyncio.sleep(0.01)
        calls.append(start(workers, "d", "modest", side=side))
        await asyncio.sleep(0.01)
        response.items.put_nowait(["first"])
        await first
        sends = await deployment.next(4)
        tenants = [[arguments[0] for arguments in argument.values()] for _, argument, _, _ in sends[:3]]
        assert "modest" in tenants[0]
        assert all(len(one) == 4 for one in tenants)
        for call in calls:
            call.cancel()

    run(use)


def test_adapters_of_different_workers_do_not_wait_for_each_other() -> None:
    async def use(deployment: Deployment, workers: ServeWorkers) -> None:
        links = WorkerLinks(workers=known_workers(), handle=deployment)  # type: ignore[arg-type]
        owned: dict[int, str] = {}
        for i in range(64):
            link = links.choose(f"{i:064x}")
            assert link is not None
            owned.setdefault(id(link), f"{i:064x}")
        assert len(owned) == 2
        for digest in owned.values():
            start(workers, digest)
        sends = await deployment.next(2)
        assert {session_id for _, _, session_id, _ in sends} == {f"{PINNED}w0", f"{PINNED}w1"}

    run(use)


def test_an_owner_with_many_calls_is_full_though_they_left_together() -> None:
    known_workers().update([WorkerReport(f"w{i}", batch=1) for i in range(2)])

    async def use(deployment: Deployment, workers: ServeWorkers) -> None:
        calls = []
        for i in range(40):
            calls.append(start(workers, "same", f"t{i}"))
            await asyncio.sleep(0)
        sends = await deployment.next(2)
        assert {session_id for _, _, session_id, _ in sends} == {f"{PINNED}w0", f"{PINNED}w1"}
        for call in calls:
            call.cancel()

    run(use)
