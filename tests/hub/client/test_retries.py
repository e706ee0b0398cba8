"""Both Python clients against a server that answers as it is told: retries, lost connections, files, odd answers."""

import json
import traceback
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import httpx
import pytest

from hub.client.retries import pause_s
from hub.errors import Conflict, HubError, InvalidRequest, LimitReached, NotFound, TooLarge, Unavailable
from tests.support.clients import DROP, KINDS, Answer, server

TASKS = json.dumps({"tasks": []}).encode()


@pytest.fixture(params=KINDS, ids=["sync", "async"])
def kind(request) -> Callable[..., Any]:
    return request.param


def problem(code: str, status: int, **headers: str) -> Answer:
    body = {"type": f"urn:karst-hub:problem:{code}", "title": "t", "status": status, "detail": "d"}
    return status, {name.replace("_", "-"): value for name, value in headers.items()}, json.dumps(body).encode()


FULL = problem("limit-reached", 429, retry_after="0")
AWAY = problem("unavailable", 503, retry_after="0")
GIVEN = (200, {}, TASKS)
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


@pytest.mark.parametrize("answers", [[FULL], [AWAY, FULL], [DROP, DROP, DROP], [(503, {}, b"<p>")]])
def test_a_call_is_tried_again(kind, answers) -> None:
    with server(*answers, GIVEN) as told, kind(told.url, "kh_x") as client:
        assert client.tasks().tasks == []
        assert len(told.paths) == len(answers) + 1


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
def test_a_call_is_not_tried_again(kind, answer, error) -> None:
    with server(answer) as told, kind(told.url, "kh_x") as client:
        with pytest.raises(error) as raised:
            client.tasks()
        assert type(raised.value) is error
        if answer[0] == 429:
            assert raised.value.retry_after_s == 3600
        assert len(told.paths) == 1


def test_a_call_is_tried_for_a_time_only(kind) -> None:
    with server((503, {}, b"")) as told, kind(told.url, "kh_x") as client:
        with pytest.raises(Unavailable, match="HTTP 503"):
            client.tasks()
        assert len(told.paths) == 4
    with server(AWAY) as told, kind(told.url, "kh_x", retry_s=0) as client:
        with pytest.raises(Unavailable):
            client.tasks()
        assert len(told.paths) == 1
    with server(AWAY) as told, kind(told.url, "kh_x", retry_s=1) as client:
        with pytest.raises(Unavailable):
            client.tasks()
        assert len(told.paths) > 1


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_is_heeded(kind, form) -> None:
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=3), usegmt=True)
    answer = problem("limit-reached", 429, retry_after="1" if form == "seconds" else date)
    with server(answer, GIVEN) as told, kind(told.url, "kh_x") as client:
        client.tasks()
        assert told.times[1] - told.times[0] >= 1


@pytest.mark.parametrize(
    ("answers", "tries", "error"),
    [([DROP], 1, Unavailable), ([AWAY], 1, Unavailable), ([FULL, (201, {}, KEY)], 2, None)],
)
def test_what_must_not_happen_twice(kind, answers, tries, error) -> None:
    with server(*answers) as told, kind(told.url, "kh_x") as client:
        if error is None:
            assert client.create_key("a", "n").key == "kh_y"
        else:
            with pytest.raises(error):
                client.create_key("a", "n")
        assert len(told.paths) == tries


def test_a_hub_that_is_about_to_listen(kind) -> None:
    with server((201, {}, KEY), late_s=0.3) as told, kind(told.url, "kh_x") as client:
        assert client.create_key("a", "n").id == "i"
        assert len(told.paths) == 1


def test_a_wait_is_not_begun_again(kind) -> None:
    with server(GIVEN, wait_s=5) as told, kind(told.url, "kh_x", timeout_s=0.2) as client:
        with pytest.raises(Unavailable, match=r"no hub answers at .*: timed out"):
            client.tasks()
        assert len(told.paths) == 1


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_where_no_hub_is_both_say_the_same_in_few_lines(kind, host) -> None:
    with kind(f"http://{host}:9", "kh_x", retry_s=0) as client, pytest.raises(Unavailable) as raised:
        client.tasks()
    assert raised.value.detail == f"no hub answers at http://{host}:9: [Errno 111] Connection refused"
    assert isinstance(raised.value.__cause__, httpx.ConnectError)
    shown = "".join(traceback.format_exception(raised.value))
    assert "site-packages" not in shown
    assert "\nThe above exception was" in shown
    assert "During handling" not in shown


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "localhost:8000", "ftp://127.0.0.1", ""])
def test_a_url_without_http_is_refused(kind, url) -> None:
    with pytest.raises(InvalidRequest, match=r"HUB_URL.*http:// or https://"):
        kind(url, "kh_x")


def test_a_file_is_there_whole_or_not_at_all(kind, tmp_path) -> None:
    half = (200, {"content-length": "10"}, b"12345")
    with server(half, (200, {}, b"1234567890")) as told, kind(told.url, "kh_x") as client:
        assert client.export_tenant("a", tmp_path / "a.tar").read_bytes() == b"1234567890"
        assert len(told.paths) == 2
    with server(half) as told, kind(told.url, "kh_x", retry_s=0) as client, pytest.raises(Unavailable):
        client.download("a", tmp_path / "b")
    with server(problem("not-found", 404)) as told, kind(told.url, "kh_x") as client, pytest.raises(NotFound):
        client.download("a", tmp_path / "c")
    assert [p.name for p in tmp_path.iterdir()] == ["a.tar"]


def test_a_file_is_sent_in_pieces(kind, tmp_path) -> None:
    (tmp_path / "a.tar").write_bytes(bytes(range(256)) * 10_000)
    with server(FULL, (201, {}, TASKS)) as told, kind(told.url, "kh_x") as client:
        client.import_tenant("a", tmp_path / "a.tar")
        assert told.bodies == [(tmp_path / "a.tar").read_bytes()] * 2
        assert told.headers[0]["content-type"] == "application/x-tar"


def test_a_closed_client_says_that_it_is_closed_and_what_to_do(kind, tmp_path) -> None:
    with server(GIVEN) as told:
        client = kind(told.url, "kh_x")
        with client:
            client.tasks()
            name = type(getattr(client, "_client", client)).__name__
            getattr(client, "close" if name == "Client" else "aclose")()
            calls: list[Callable[[], Any]] = [
                client.tasks,
                lambda: client.classify("flowers", [b"image"]),
                lambda: client.register("flowers", b"adapter"),
                lambda: client.download("flowers", tmp_path / "file"),
            ]
            for call in calls:
                with pytest.raises(RuntimeError, match=f"this {name} is closed: make a new one") as raised:
                    call()
                assert not isinstance(raised.value, HubError)
        assert len(told.paths) == 1
        assert list(tmp_path.iterdir()) == []


def test_connections_are_kept(kind) -> None:
    with server(GIVEN) as told, kind(told.url, "kh_x") as client:
        for _ in range(5):
            client.tasks()
        assert len(told.paths) == 5
        assert told.connections == 1


def test_what_a_newer_hub_adds_is_passed_over(kind) -> None:
    task = {"task": "a", "latest": 1, "classes": 2, "aliases": {}, "mood": "good"}
    newer = json.dumps({"tasks": [task], "next": None}).encode()
    with server((200, {}, newer)) as told, kind(told.url, "kh_x") as client:
        assert client.tasks().tasks[0].task == "a"


def test_the_first_failure_ends_the_other_calls(kind) -> None:
    classified = json.dumps({"task": "a", "version": 1, "digest": "d", "predictions": [[]] * 64}).encode()
    with server((200, {}, classified), (404, {}, b"")) as told, kind(told.url, "kh_x", in_flight=2) as client:
        with pytest.raises(HubError, match="HTTP 404"):
            client.classify("a", [b"image"] * 64 * 20)
        assert len(told.paths) <= 5


def test_a_canary_key_is_sent(kind) -> None:
    classified = json.dumps({"task": "a", "version": 1, "digest": "d", "predictions": [[]]}).encode()
    with server((200, {}, classified)) as told, kind(told.url, "kh_x\n") as client:
        client.classify("a", b"image", canary_key="user 17", version="stable")
        assert told.headers[0]["x-canary-key"] == "user 17"
        assert told.headers[0]["authorization"] == "Bearer kh_x"
        assert told.paths == ["/v1/tasks/a/classify?top_k=5&version=stable"]


def lost(kind: type[httpx.RequestError]) -> HubError:
    error = Unavailable("lost", retry_after_s=None)
    error.__cause__ = kind("lost")
    return error


@pytest.mark.parametrize(
    ("error", "repeatable", "others"),
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
def test_what_may_be_tried_again(error, repeatable, others) -> None:
    for may_repeat, expected in ((True, repeatable), (False, others)):
        pause = pause_s(error, repeatable=may_repeat, tries=1, left_s=60)
        assert (pause is not None) == expected


def test_pauses_grow_and_end() -> None:
    blind = [pause_s(lost(httpx.ConnectError), repeatable=True, tries=n, left_s=60) for n in range(1, 5)]
    for pause, most in zip(blind, (0.25, 0.5, 1.0), strict=False):
        assert pause is not None
        assert most / 2 <= pause <= most
    assert blind[3] is None
    for tries in (1, 5, 1000):
        told = pause_s(LimitReached("full", retry_after_s=7), repeatable=True, tries=tries, left_s=60)
        assert told is not None
        assert 7 < told <= 9
    assert pause_s(LimitReached("full", retry_after_s=7), repeatable=True, tries=1, left_s=7) is None
