"""Tests of both Python clients against a scripted server: retries, lost connections, files, malformed replies."""

import json
import traceback
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from hub import Client
from hub.client.retries import RetrySchedule, error_of
from hub.errors import Conflict, HubError, InvalidRequest, LimitReached, NotFound, TooLarge, Unavailable
from tests.support.clients import DROP, KINDS, Answer, server

Kind = Callable[..., Any]  # `Client`, or `AsyncClient` with blocking methods
TASKS = json.dumps({"tasks": []}).encode()


@pytest.fixture(params=KINDS, ids=["sync", "async"])
def kind(request: pytest.FixtureRequest) -> Kind:
    client_class: Kind = request.param
    return client_class


def problem(code: str, status: int, **headers: str) -> Answer:
    body = {"type": f"urn:karst-hub:problem:{code}", "title": "t", "status": status, "detail": "d"}
    return status, {name.replace("_", "-"): value for name, value in headers.items()}, json.dumps(body).encode()


LIMITED = problem("limit-reached", 429, retry_after="0")
UNAVAILABLE = problem("unavailable", 503, retry_after="0")
SUCCESS: Answer = (200, {}, TASKS)
KEY = json.dumps(
    {
        "id": "i",
        "name": "n",
        "role": "caller",
        "created": "c",
        "expires": None,
        "last_used": None,
        "key": "kh_y",
    }
).encode()


@pytest.mark.parametrize("answers", [[LIMITED], [UNAVAILABLE, LIMITED], [DROP, DROP, DROP], [(503, {}, b"<p>")]])
def test_client_retries_when_the_error_is_temporary(kind: Kind, answers: list[Answer]) -> None:
    with server(*answers, SUCCESS) as scripted, kind(scripted.url, "kh_x") as client:
        assert client.tasks().tasks == []
        assert len(scripted.paths) == len(answers) + 1


CLASSIFIED = {"task": "a", "version": 1, "digest": "0" * 64, "predictions": [[{"label": "cat", "score": 1.0}]]}


def test_client_classifies_again_when_the_hub_disconnects_without_a_response(kind: Kind) -> None:
    """A gateway that stops, or HAProxy, closes a kept-alive connection that has a request on it."""
    reply: Answer = (200, {}, json.dumps(CLASSIFIED).encode())
    with server(reply, DROP, DROP, reply) as scripted, kind(scripted.url, "kh_x") as client:
        for _ in range(2):
            assert client.classify("a", [b"an image"]).predictions[0][0].label == "cat"
        assert len(scripted.bodies) == 4
        assert all(b"an image" in body for body in scripted.bodies)


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (problem("not-found", 404), NotFound),
        (problem("conflict", 409, retry_after="0"), Conflict),
        (problem("internal", 500), HubError),
        ((413, {}, b"<p>too large"), TooLarge),
        ((200, {}, b"<p>hello"), HubError),
        ((307, {"location": "/elsewhere"}, b""), HubError),
        (problem("limit-reached", 429, retry_after="3600"), LimitReached),
        (problem("of a newer hub", 429, retry_after="3600"), LimitReached),
    ],
)
def test_client_does_not_retry_when_the_error_is_permanent(kind: Kind, answer: Answer, error: type[HubError]) -> None:
    with server(answer) as scripted, kind(scripted.url, "kh_x") as client:
        with pytest.raises(error) as raised:
            client.tasks()
        assert type(raised.value) is error
        if answer[0] == 429:
            assert raised.value.retry_after_s == 3600
        assert len(scripted.paths) == 1


def test_client_makes_four_attempts_when_the_error_has_no_retry_after(kind: Kind) -> None:
    with server((503, {}, b"")) as scripted, kind(scripted.url, "kh_x") as client:
        with pytest.raises(Unavailable, match="HTTP 503"):
            client.tasks()
        assert len(scripted.paths) == 4


def test_client_makes_one_attempt_when_retry_s_is_zero(kind: Kind) -> None:
    with server(UNAVAILABLE) as scripted, kind(scripted.url, "kh_x", retry_s=0) as client:
        with pytest.raises(Unavailable):
            client.tasks()
        assert len(scripted.paths) == 1


def test_client_pauses_when_it_retries(kind: Kind) -> None:
    with server(LIMITED, SUCCESS) as scripted, kind(scripted.url, "kh_x") as client:
        client.tasks()
        assert scripted.times[1] - scripted.times[0] >= 0.125  # a lower bound: load on the machine cannot break it


NOW = datetime(2030, 1, 2, 3, 4, 5, tzinfo=UTC)


@pytest.mark.parametrize(
    ("header", "expected_s"),
    [
        ("7", 7),
        (format_datetime(NOW + timedelta(seconds=3), usegmt=True), 3),
        (format_datetime(NOW - timedelta(seconds=3), usegmt=True), 0),
        ("soon", None),
        ("-1", None),
    ],
)
def test_error_has_the_seconds_of_retry_after(header: str, expected_s: int | None) -> None:
    response = httpx.Response(429, headers={"retry-after": header})
    assert error_of(response, now=lambda: NOW).retry_after_s == expected_s


@pytest.mark.parametrize(
    ("answers", "attempts", "error"),
    [([DROP], 1, Unavailable), ([UNAVAILABLE], 1, Unavailable), ([LIMITED, (201, {}, KEY)], 2, None)],
)
def test_client_retries_a_creation_only_when_the_hub_cannot_have_run_it(
    kind: Kind, answers: list[Answer], attempts: int, error: type[HubError] | None
) -> None:
    with server(*answers) as scripted, kind(scripted.url, "kh_x") as client:
        if error is None:
            assert client.create_key("a", "n").key == "kh_y"
        else:
            with pytest.raises(error):
                client.create_key("a", "n")
        assert len(scripted.paths) == attempts


def test_client_retries_when_the_hub_does_not_listen_yet(kind: Kind) -> None:
    with server((201, {}, KEY), late_s=0.3) as scripted, kind(scripted.url, "kh_x") as client:
        assert client.create_key("a", "n").id == "i"
        assert len(scripted.paths) == 1


def test_client_does_not_retry_when_a_read_times_out(kind: Kind) -> None:
    with server(SUCCESS, wait_s=5) as scripted, kind(scripted.url, "kh_x", timeout_s=0.2) as client:
        with pytest.raises(Unavailable, match=r"no hub answers at .*: timed out"):
            client.tasks()
        assert len(scripted.paths) == 1


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_both_clients_raise_the_same_short_error_when_no_hub_listens(kind: Kind, host: str) -> None:
    with kind(f"http://{host}:9", "kh_x", retry_s=0) as client, pytest.raises(Unavailable) as raised:
        client.tasks()
    assert raised.value.detail == f"no hub answers at http://{host}:9: [Errno 111] Connection refused"
    assert isinstance(raised.value.__cause__, httpx.ConnectError)
    shown = "".join(traceback.format_exception(raised.value))
    assert "site-packages" not in shown
    assert "\nThe above exception was" in shown
    assert "During handling" not in shown


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "localhost:8000", "ftp://127.0.0.1", ""])
def test_client_raises_invalid_request_when_the_url_lacks_a_scheme(kind: Kind, url: str) -> None:
    with pytest.raises(InvalidRequest, match=r"HUB_URL.*http:// or https://"):
        kind(url, "kh_x")


def test_download_writes_no_file_when_the_reply_is_incomplete(kind: Kind, tmp_path: Path) -> None:
    half = (200, {"content-length": "10"}, b"12345")
    with server(half, (200, {}, b"1234567890")) as scripted, kind(scripted.url, "kh_x") as client:
        assert client.export_tenant("a", tmp_path / "a.tar").read_bytes() == b"1234567890"
        assert len(scripted.paths) == 2
    with server(half) as scripted, kind(scripted.url, "kh_x", retry_s=0) as client, pytest.raises(Unavailable):
        client.download("a", tmp_path / "b")
    with server(problem("not-found", 404)) as scripted, kind(scripted.url, "kh_x") as client, pytest.raises(NotFound):
        client.download("a", tmp_path / "c")
    assert [p.name for p in tmp_path.iterdir()] == ["a.tar"]


def test_import_sends_the_whole_file_when_it_is_retried(kind: Kind, tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(bytes(range(256)) * 10_000)
    with server(LIMITED, (201, {}, TASKS)) as scripted, kind(scripted.url, "kh_x") as client:
        client.import_tenant("a", tmp_path / "a.tar")
        assert scripted.bodies == [(tmp_path / "a.tar").read_bytes()] * 2
        assert scripted.headers[0]["content-type"] == "application/x-tar"


def test_client_raises_runtime_error_when_it_is_closed(kind: Kind, tmp_path: Path) -> None:
    with server(SUCCESS) as scripted:
        client = kind(scripted.url, "kh_x")
        with client:
            client.tasks()
            if kind is Client:
                client.close()
            else:
                client.aclose()
            calls: list[Callable[[], Any]] = [
                client.tasks,
                lambda: client.classify("flowers", [b"image"]),
                lambda: client.register("flowers", b"adapter"),
                lambda: client.download("flowers", tmp_path / "file"),
            ]
            for call in calls:
                with pytest.raises(RuntimeError, match=r"this (Async)?Client is closed; create a new one") as raised:
                    call()
                assert not isinstance(raised.value, HubError)
        assert len(scripted.paths) == 1
        assert list(tmp_path.iterdir()) == []


def test_client_reuses_its_connection_when_it_sends_several_calls(kind: Kind) -> None:
    with server(SUCCESS) as scripted, kind(scripted.url, "kh_x") as client:
        for _ in range(5):
            client.tasks()
        assert len(scripted.paths) == 5
        assert scripted.connections == 1


def test_client_ignores_fields_when_a_newer_hub_adds_them(kind: Kind) -> None:
    task = {"task": "a", "latest": 1, "classes": 2, "aliases": {}, "mood": "good"}
    newer = json.dumps({"tasks": [task], "next": None}).encode()
    with server((200, {}, newer)) as scripted, kind(scripted.url, "kh_x") as client:
        assert client.tasks().tasks[0].task == "a"


def test_client_cancels_the_other_calls_when_one_fails(kind: Kind) -> None:
    classified = json.dumps({"task": "a", "version": 1, "digest": "d", "predictions": [[]] * 64}).encode()
    with server((200, {}, classified), (404, {}, b"")) as scripted, kind(scripted.url, "kh_x", in_flight=2) as client:
        with pytest.raises(HubError, match="HTTP 404"):
            client.classify("a", [b"image"] * 64 * 20)
        assert len(scripted.paths) <= 5


def test_client_sends_the_canary_key(kind: Kind) -> None:
    classified = json.dumps({"task": "a", "version": 1, "digest": "d", "predictions": [[]]}).encode()
    with server((200, {}, classified)) as scripted, kind(scripted.url, "kh_x\n") as client:
        client.classify("a", b"image", canary_key="user 17", version="stable")
        assert scripted.headers[0]["x-canary-key"] == "user 17"
        assert scripted.headers[0]["authorization"] == "Bearer kh_x"
        assert scripted.paths == ["/v1/tasks/a/classify?top_k=5&version=stable"]


def lost(kind: type[httpx.RequestError]) -> HubError:
    error = Unavailable("lost", retry_after_s=None)
    error.__cause__ = kind("lost")
    return error


@pytest.mark.parametrize(
    ("error", "idempotent", "others"),
    [
        (LimitReached("full"), True, True),
        (Unavailable("away"), True, False),
        (lost(httpx.ConnectError), True, True),
        (lost(httpx.ConnectTimeout), True, True),
        (lost(httpx.PoolTimeout), True, True),
        (lost(httpx.ReadError), True, False),
        (lost(httpx.WriteError), True, False),
        (lost(httpx.RemoteProtocolError), True, False),
        (lost(httpx.ReadTimeout), False, False),
        (lost(httpx.WriteTimeout), False, False),
        (lost(httpx.UnsupportedProtocol), False, False),
        (NotFound("none"), False, False),
        (HubError("internal"), False, False),
    ],
)
def test_schedule_allows_a_retry_when_it_is_safe_and_may_help(error: HubError, idempotent: bool, others: bool) -> None:
    for is_idempotent, expected in ((True, idempotent), (False, others)):
        pause = RetrySchedule(60).pause_s(error, idempotent=is_idempotent)
        assert (pause is not None) == expected


def test_schedule_doubles_its_pauses_and_gives_up_when_the_error_has_no_retry_after() -> None:
    schedule = RetrySchedule(60)
    pauses = [schedule.pause_s(lost(httpx.ConnectError), idempotent=True) for _ in range(4)]
    for pause, longest in zip(pauses, (0.25, 0.5, 1.0), strict=False):
        assert pause is not None
        assert longest / 2 <= pause <= longest
    assert pauses[3] is None


def test_schedule_waits_for_retry_after_until_its_deadline() -> None:
    clock_s = 100.0
    schedule = RetrySchedule(1000, clock=lambda: clock_s)
    error = LimitReached("full", retry_after_s=7)
    pause = schedule.pause_s(error, idempotent=True)
    while pause is not None:
        assert 7 < pause <= 9
        clock_s += pause
        pause = schedule.pause_s(error, idempotent=True)
    assert 1091 <= clock_s <= 1100
    assert schedule.attempts > 100


def test_schedule_gives_up_when_retry_after_is_beyond_its_deadline() -> None:
    schedule = RetrySchedule(7, clock=lambda: 100.0)
    assert schedule.pause_s(LimitReached("full", retry_after_s=7), idempotent=True) is None
