"""The reason why a hub did not start, from Ray's error and from the output of HAProxy and Ray's processes."""

import re
from collections.abc import Sequence
from pathlib import Path

from ..cluster.ray_compat import haproxy_logs, process_logs
from ..observability.log_format import mask_secrets

LINES = 3  # of each program
HAPROXY_ERROR = re.compile(
    r"\[ALERT\]\s*(?:\(\d+\)\s*:\s*)?(.+)|^(?![\[\s])(.+)"
)  # the latter: of the hub's own program
RAY_ERROR = re.compile(r"^\[[^\]]* [EFC] [^\]]*\] (.+)|((?:\w*Error|\w*Exception): .+)")


def start_error(error: Exception, folder: Path) -> str:
    """Return one text for the user: the error's reason, then the last errors of HAProxy and of Ray's processes.

    Args:
        folder: the hub's private folder, with the logs.
    """
    parts = [f"Ray Serve could not start the hub: {_reason(error)}"]
    parts += [f"HAProxy: {line}" for line in _last(haproxy_logs(folder), HAPROXY_ERROR)]
    parts += [f"Ray: {line}" for line in _last(process_logs(folder), RAY_ERROR)]
    return mask_secrets("\n".join(parts))


def _reason(error: Exception) -> str:
    """Return the last error of a worker's traceback, without its module; otherwise the first line."""
    named = re.findall(r"^\s*(?:[\w.]+\.)?(\w*(?:Error|Exception): .+)$", str(error), re.MULTILINE)
    return named[-1] if named else str(error).partition("\n")[0]


def _last(files: Sequence[Path], pattern: re.Pattern[str]) -> list[str]:
    """Return the last different lines of the files that the pattern finds."""
    found: dict[str, None] = {}
    for file in files:
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            if match := pattern.search(line):
                found[next(text for text in match.groups() if text).strip()] = None
    return list(found)[-LINES:]
