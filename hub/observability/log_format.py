"""Log lines as JSON or text, with the context of the request and with masked secrets."""

import json
import logging
import re
import sys
import traceback
from datetime import UTC, datetime
from typing import Literal

from . import request_context

Format = Literal["json", "text"]
Level = Literal["debug", "info", "warning", "error"]

LOGGERS = ("hub", "adapters")
# API keys, user and password of a URL, bearer tokens.
SECRETS = re.compile(r"kh_[\w-]{8,}|(?<=://)[^/\s@]+:[^/\s@]*(?=@)|(?<=earer )\S+")
FAULT = re.compile(r"Traceback|\bERROR\b|Fatal|Error: ")
OWN_LINE = re.compile(rb'\{"time": "|\d{4}-\d\d-\d\dT[\d:.]+Z [A-Z]+ ')  # how each line of the two formatters begins
CONTROL_CHARACTERS = {code: f"\\x{code:02x}" for code in (*range(32), 127)}


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
            "message": mask_secrets(record.getMessage()),
            **_fields(record),
        }
        if record.exc_info and record.exc_info[0] is not None:
            line["error"] = mask_secrets("".join(traceback.format_exception(*record.exc_info)))
        return json.dumps(line, default=str)


class TextFormatter(logging.Formatter):
    """Lines for a terminal: `time LEVEL logger: message (request_id=..., tenant=...)`, then a traceback."""

    def format(self, record: logging.LogRecord) -> str:
        fields = " ".join(f"{name}={value}" for name, value in _fields(record).items())
        # Control characters are escaped: otherwise a client could forge log lines with a line feed in a name.
        message = mask_secrets(record.getMessage()).translate(CONTROL_CHARACTERS)
        line = f"{_time(record)} {record.levelname} {record.name}: {message}" + (f" ({fields})" if fields else "")
        if record.exc_info and record.exc_info[0] is not None:
            line += "\n" + mask_secrets("".join(traceback.format_exception(*record.exc_info))).rstrip()
        return line


def foreign_line(text: str, format: Format) -> str:
    """Return text that another program wrote to stderr, such as a traceback of Ray's, as a log line."""
    text = mask_secrets(text)
    if format == "text":
        return text
    level = "error" if FAULT.search(text) else "warning"
    return json.dumps({"time": _text(datetime.now(UTC)), "level": level, "logger": "ray", "message": text})


def mask_secrets(text: str) -> str:
    """Return the text with `***` in place of API keys, bearer tokens and the passwords of URLs."""
    return SECRETS.sub("***", text)


def _fields(record: logging.LogRecord) -> dict[str, object]:
    """Return the members of the request's context and of the record's own `fields`."""
    return {**request_context.log_fields(), **getattr(record, "fields", {})}


def _time(record: logging.LogRecord) -> str:
    return _text(datetime.fromtimestamp(record.created, UTC))


def _text(time: datetime) -> str:
    return time.isoformat(timespec="milliseconds").replace("+00:00", "Z")
