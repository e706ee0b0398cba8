"""Log lines as JSON or text, with the context of the request and with masked secrets."""

import json
import logging
import re
import sys
import traceback
from datetime import UTC, datetime
from types import TracebackType
from typing import Literal

from ..control_characters import escaped, escaped_json, escaped_lines
from . import request_context

Format = Literal["json", "text"]
Level = Literal["debug", "info", "warning", "error"]
ExceptionInfo = tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]

LOGGERS = ("hub", "adapters")
# API keys, user and password of a URL, bearer tokens.
SECRETS = re.compile(r"kh_[\w-]{8,}|(?<=://)[^/\s@]+:[^/\s@]*(?=@)|(?<=earer )\S+")
FAULT = re.compile(r"Traceback|\bERROR\b|Fatal|Error: ")
OWN_LINE = re.compile(rb'\{"time": "|\d{4}-\d\d-\d\dT[\d:.]+Z [A-Z]+ ')  # how each line of the two formatters begins
MAX_MESSAGE = 8_000  # characters: a message may repeat the text of a client or of a file
MAX_TRACEBACK = 40_000  # characters


def start(format: Format, level: Level) -> None:
    """Write the log lines of the hub and of the library to this process's stderr. A second call replaces the first."""
    formatter: logging.Formatter = JsonFormatter() if format == "json" else TextFormatter()
    for name in LOGGERS:
        logger = logging.getLogger(name)
        logger.setLevel(level.upper())
        for handler in [h for h in logger.handlers if isinstance(h.formatter, JsonFormatter | TextFormatter)]:
            logger.removeHandler(handler)
        # Ray Serve replaces `sys.stderr` in a replica by its own logger; the lines would go through two loggers.
        handler = logging.StreamHandler(sys.__stderr__)
        handler.setFormatter(formatter)
        logger.addHandler(handler)


class JsonFormatter(logging.Formatter):
    """One JSON object per line.

    Members: `time` (RFC 3339, UTC), `level`, `logger`, `message`, the request's context, and `error` (a traceback).
    """

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": _message(record),
            **_fields(record),
        }
        if record.exc_info and record.exc_info[0] is not None:
            line["error"] = _traceback(record.exc_info)
        return escaped_json(json.dumps(line, default=str))


class TextFormatter(logging.Formatter):
    """Lines for a terminal: `time LEVEL logger: message (request_id=..., tenant=...)`, then a traceback."""

    def format(self, record: logging.LogRecord) -> str:
        fields = " ".join(f"{name}={value}" for name, value in _fields(record).items())
        # Control characters are escaped: otherwise a client could forge log lines with a line feed in a name.
        message = f"{_message(record)} ({fields})" if fields else _message(record)
        line = f"{_time(record)} {record.levelname} {record.name}: {escaped(message)}"
        if record.exc_info and record.exc_info[0] is not None:
            line += "\n" + escaped_lines(_traceback(record.exc_info)).rstrip()
        return line


def foreign_line(text: str, format: Format) -> str:
    """Return text that another program wrote to stderr, such as a traceback of Ray's, as a log line."""
    text = mask_secrets(text)
    if format == "text":
        return escaped_lines(text)
    level = "error" if FAULT.search(text) else "warning"
    line = {"time": _text(datetime.now(UTC)), "level": level, "logger": "ray", "message": text}
    return escaped_json(json.dumps(line))


def mask_secrets(text: str) -> str:
    """Return the text with `***` in place of API keys, bearer tokens and the passwords of URLs."""
    return SECRETS.sub("***", text)


def _message(record: logging.LogRecord) -> str:
    return _cut(mask_secrets(record.getMessage()), MAX_MESSAGE)


def _traceback(error: ExceptionInfo) -> str:
    return _cut(mask_secrets("".join(traceback.format_exception(*error))), MAX_TRACEBACK)


def _cut(text: str, limit: int) -> str:
    """Return both ends of a long text: the end of a traceback names the error."""
    return text if len(text) <= limit else f"{text[: limit // 2]} ... {text[-limit // 2 :]}"


def _fields(record: logging.LogRecord) -> dict[str, object]:
    """Return the members of the request's context and of the record's own `fields`."""
    return {**request_context.log_fields(), **getattr(record, "fields", {})}


def _time(record: logging.LogRecord) -> str:
    return _text(datetime.fromtimestamp(record.created, UTC))


def _text(time: datetime) -> str:
    return time.isoformat(timespec="milliseconds").replace("+00:00", "Z")
