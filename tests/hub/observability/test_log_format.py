"""Log lines: their members, escaped control characters, and masked secrets."""

import json
import logging
import re
from collections.abc import Iterator
from typing import Any

import pytest

from hub.observability import log_format, request_context
from hub.observability.log_format import Format, JsonFormatter, TextFormatter, foreign_line
from hub.observability.request_context import RequestContext


def line(formatter: logging.Formatter, message: str, *args: object, exc_info: Any = None) -> str:
    return formatter.format(logging.LogRecord("hub.test", logging.WARNING, "test.py", 1, message, args, exc_info))


@pytest.fixture
def context() -> Iterator[RequestContext]:
    context = RequestContext("r-1", "acme", "digits", 2, "d" * 64)
    with request_context.use(context):
        yield context


@pytest.mark.usefixtures("context")
def test_a_json_line_has_the_context_of_the_request() -> None:
    members = json.loads(line(JsonFormatter(), "%d images", 3))
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", members.pop("time"))
    assert members == {
        "level": "warning",
        "logger": "hub.test",
        "message": "3 images",
        "request_id": "r-1",
        "tenant": "acme",
        "task": "digits",
        "version": 2,
        "digest": "d" * 64,
    }


@pytest.mark.usefixtures("context")
def test_a_text_line_has_the_context_of_the_request() -> None:
    assert "hub.test: x (request_id=r-1 tenant=acme task=digits version=2 digest=" in line(TextFormatter(), "x")


def test_a_line_outside_of_a_request_has_no_context() -> None:
    assert set(json.loads(line(JsonFormatter(), "x"))) == {"time", "level", "logger", "message"}
    assert line(TextFormatter(), "x").endswith("Z WARNING hub.test: x")


def test_a_traceback_is_one_member_of_a_json_line() -> None:
    try:
        raise ValueError("two\nlines")
    except ValueError as error:
        text = line(JsonFormatter(), "failed", exc_info=(type(error), error, error.__traceback__))
    assert "\n" not in text
    assert "ValueError: two\nlines" in json.loads(text)["error"]


def test_a_client_cannot_forge_text_lines_by_control_characters() -> None:
    text = line(TextFormatter(), "bad task %s", "x\n2026-01-01 ERROR forged\x1b[31m\x9b31m\u202e")
    assert not {*"\n\x1b\x9b\u202e"} & {*text}
    assert "\\x0a2026" in text
    try:
        raise ValueError("\x1b[2J\x9b")
    except ValueError as error:
        text = line(TextFormatter(), "failed", exc_info=(type(error), error, error.__traceback__))
    assert not {*"\x1b\x9b"} & {*text}


@pytest.mark.parametrize("formatter", [JsonFormatter(), TextFormatter()])
def test_line_is_short_when_its_message_or_its_error_is_long(formatter: logging.Formatter) -> None:
    assert len(line(formatter, "bad task %s", "x" * 1_000_000)) < 10_000
    try:
        raise ValueError("x" * 1_000_000, "the end")
    except ValueError as error:
        text = line(formatter, "failed", exc_info=(type(error), error, error.__traceback__))
    assert len(text) < 50_000
    assert "ValueError" in text
    assert "the end" in text


@pytest.mark.parametrize("formatter", [JsonFormatter(), TextFormatter()])
@pytest.mark.parametrize(
    "secret",
    [
        "kh_0123456789abcdefABCDEF-_0123456789abcdefABC",
        "redis://user:hunter2@host:6379/0",
        "Authorization: Bearer hunter2hunter2",
    ],
)
def test_secrets_are_masked_in_message_and_traceback(formatter: logging.Formatter, secret: str) -> None:
    try:
        raise RuntimeError(f"cannot use {secret}")
    except RuntimeError as error:
        text = line(formatter, "failed with %s", secret, exc_info=(type(error), error, error.__traceback__))
    assert "hunter2" not in text
    assert "0123456789abcdef" not in text
    assert text.count("***") >= 2


def test_start_adds_one_handler_when_it_is_called_twice(capfd: pytest.CaptureFixture[str]) -> None:
    loggers = [logging.getLogger(name) for name in ("hub", "adapters")]
    before = [(logger, logger.level, list(logger.handlers)) for logger in loggers]
    formats: tuple[Format, ...] = ("text", "json")
    try:
        for format in formats:
            log_format.start(format, "info")
        logging.getLogger("hub.anything").info("shown")
        logging.getLogger("hub.anything").debug("hidden")
        lines = capfd.readouterr().err.splitlines()
        assert [json.loads(text)["message"] for text in lines] == ["shown"]
    finally:
        for logger, level, handlers in before:
            logger.setLevel(level)
            logger.handlers[:] = handlers


def test_a_line_of_another_program_has_the_configured_format_and_no_secret() -> None:
    text = "ValueError: kh_0123456789abcdef"
    assert foreign_line(text, "text") == "ValueError: ***"
    found = json.loads(foreign_line(text, "json"))
    assert (found["level"], found["logger"], found["message"]) == ("error", "ray", "ValueError: ***")
    assert found["time"].endswith("Z")
    assert json.loads(foreign_line("odd", "json"))["level"] == "warning"
