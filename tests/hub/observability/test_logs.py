"""Log lines that say for whom they were written, without secrets; request ids taken, made and returned."""

import asyncio
import json
import logging
import re
import uuid

import pytest

from hub.observability import logs
from hub.observability.logs import About, Asked, JsonLines, Requests, TextLines
from hub.worker_api import CallOrigin
from tests.support.models import png


def line(format: logging.Formatter, message: str, *args: object, exc_info=None, **extra: object) -> str:
    record = logging.LogRecord("hub.test", logging.WARNING, "test.py", 1, message, args, exc_info)
    record.__dict__ |= extra
    return format.format(record)


@pytest.fixture
def asked():
    token = logs._asked.set(Asked("r-1", "acme", "digits", 2, "d" * 64))
    about = logs._about.set(About())
    yield logs.current()
    logs._about.reset(about)
    logs._asked.reset(token)


def test_a_json_line_has_all_that_is_known(asked) -> None:
    read = json.loads(line(JsonLines(), "%d things", 3))
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", read.pop("time"))
    assert read == {
        "level": "warning",
        "logger": "hub.test",
        "message": "3 things",
        "request_id": "r-1",
        "tenant": "acme",
        "task": "digits",
        "version": 2,
        "digest": "d" * 64,
    }


def test_a_line_outside_of_a_request_has_none_of_it() -> None:
    assert set(json.loads(line(JsonLines(), "x"))) == {"time", "level", "logger", "message"}
    assert line(TextLines(), "x").endswith("Z WARNING hub.test: x")


def test_a_traceback_is_one_json_line() -> None:
    try:
        raise ValueError("two\nlines")
    except ValueError as error:
        text = line(JsonLines(), "failed", exc_info=(type(error), error, error.__traceback__))
    assert "\n" not in text
    assert "ValueError: two\nlines" in json.loads(text)["error"]


def test_no_client_writes_lines_of_its_own(asked) -> None:
    asked.tenant = "acme"
    text = line(TextLines(), "bad task %s", "x\n2026-01-01 ERROR forged\x1b[31m")
    assert "\n" not in text
    assert "\x1b" not in text
    assert "\\x0a2026" in text


@pytest.mark.parametrize("format", [JsonLines(), TextLines()])
@pytest.mark.parametrize(
    "secret",
    [
        "kh_0123456789abcdefABCDEF-_0123456789abcdefABC",
        "redis://user:hunter2@host:6379/0",
        "Authorization: Bearer hunter2hunter2",
    ],
)
def test_secrets_are_masked(format, secret) -> None:
    try:
        raise RuntimeError(f"cannot use {secret}")
    except RuntimeError as error:
        text = line(format, "said %s", secret, exc_info=(type(error), error, error.__traceback__))
    assert "hunter2" not in text
    assert "0123456789abcdef" not in text
    assert text.count("***") >= 2


def test_the_known_narrows_to_the_task_that_the_code_works_for(asked) -> None:
    asked.task = ""

    async def one(task: str, version: int) -> dict:
        logs.note_task(task, version, task * 64)
        await asyncio.sleep(0)
        return logs._known()

    async def use():
        return await asyncio.gather(one("a", 1), one("b", 2))

    first, second = asyncio.run(use())
    assert (first["task"], first["version"], first["request_id"]) == ("a", 1, "r-1")
    assert (second["task"], second["version"]) == ("b", 2)
    assert (asked.task, asked.version, asked.digest) == ("several", None, "")


def test_a_worker_logs_for_the_request_that_called(asked) -> None:
    logs.note_task("digits", 2, "d" * 64)
    origin = logs.origin()
    assert origin == CallOrigin("r-1", "digits", "")
    with logs.within(origin, "acme", "d" * 64):
        read = json.loads(line(JsonLines(), "x"))
        assert (read["request_id"], read["tenant"], read["task"], read["digest"]) == ("r-1", "acme", "digits", "d" * 64)
    assert logs.current() is asked


def test_start_sets_one_handler_however_often_it_is_called(capfd) -> None:
    loggers = [logging.getLogger(name) for name in ("hub", "adapters")]
    before = [(x, x.level, list(x.handlers)) for x in loggers]
    try:
        for format in ("text", "json"):
            logs.start(format, "info")  # type: ignore[arg-type]
        logging.getLogger("hub.anything").info("said")
        logging.getLogger("hub.anything").debug("not said")
        said = capfd.readouterr().err.splitlines()
        assert [json.loads(text)["message"] for text in said] == ["said"]
    finally:
        for x, level, handlers in before:
            x.setLevel(level)
            x.handlers[:] = handlers


async def call(app, *headers: tuple[bytes, bytes]) -> list:
    sent = []

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": "/x", "headers": list(headers), "query_string": b""}
    await app(scope, None, send)
    return sent


def test_requests_are_told_how_they_ended(caplog) -> None:
    told = []

    class Meter:
        def answered(self, asked, status, seconds):
            told.append((asked.request_id, asked.tenant, status))
            assert seconds >= 0

    async def answers(scope, receive, send):
        logs.note_tenant("acme")
        await send({"type": "http.response.start", "status": 503, "headers": []})

    async def fails(scope, receive, send):
        raise RuntimeError("no")

    async def is_cancelled(scope, receive, send):
        raise asyncio.CancelledError

    given = (b"x-request-id", b"mine")
    with caplog.at_level(logging.WARNING, "hub.requests"):
        asyncio.run(call(Requests(answers, Meter()), given))
    assert [r.getMessage() for r in caplog.records] == ["GET /x"]
    assert caplog.records[0].known["status"] == 503
    with pytest.raises(RuntimeError):
        asyncio.run(call(Requests(fails, Meter()), given))
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(call(Requests(is_cancelled, Meter()), given))
    assert told == [("mine", "acme", 503), ("mine", "", 500), ("mine", "", 499)]
    assert logs.current() is None


def test_where_ray_returns_the_id_it_is_not_returned_twice() -> None:
    async def answers(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": [(b"a", b"b")]})

    sent = asyncio.run(call(Requests(answers, id_is_returned=True), (b"x-request-id", b"mine")))
    assert sent[0]["headers"] == [(b"a", b"b")]


@pytest.mark.parametrize("given", ["a", "x" * 128, "0b5e-77:~!", str(uuid.uuid4())])
def test_a_usable_id_comes_back(hub, given) -> None:
    answer = hub.http.get("/healthz", headers={"x-request-id": given})
    assert answer.headers.get_list("x-request-id") == [given]


@pytest.mark.parametrize("given", [None, "", "x" * 129, "with space", "tab\t", "caf\u00e9"])
def test_another_one_is_made(hub, given) -> None:
    headers = {} if given is None else {"x-request-id": given.encode()}
    for path, status in (("/healthz", 200), ("/v1/tasks/absent", 404), ("/nowhere", 404)):
        answer = hub.http.get(path, headers=headers)
        assert answer.status_code == status
        (made,) = answer.headers.get_list("x-request-id")
        assert str(uuid.UUID(made)) == made


def test_every_request_of_a_hub_says_what_it_was_about(hub, adapters, caplog) -> None:
    hub.http.post("/v1/tasks/digits/versions", content=adapters[0].data)
    with caplog.at_level(logging.DEBUG, "hub.requests"):
        seen = []
        logger = logging.getLogger("hub.requests")

        class Keeping(logging.Handler):
            def emit(self, record):
                seen.append(json.loads(JsonLines().format(record)))

        handler = Keeping()
        logger.addHandler(handler)
        try:
            hub.http.post("/v1/tasks/digits/classify", content=png(0), headers={"x-request-id": "one"})
            hub.http.post("/v1/tasks/absent/classify", content=png(0), headers={"x-request-id": "two"})
        finally:
            logger.removeHandler(handler)
    one, two = seen
    assert (one["request_id"], one["tenant"], one["task"], one["version"]) == ("one", "default", "digits", 1)
    assert (one["digest"], one["status"]) == (adapters[0].digest, 200)
    assert (two["request_id"], two["status"], two["error_type"]) == ("two", 404, "not-found")
    assert "task" not in two
