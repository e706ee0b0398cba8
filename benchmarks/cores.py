"""Whose processor time it was: the processes of a hub on this machine, by what they are."""

import os
import re
from collections import Counter

import psutil

_REPLICA = re.compile(r"ServeReplica:[\w-]+:(\w+)")


def seconds() -> Counter[str]:
    """Processor time so far of `gateway` and `worker` (of whatever application), `haproxy`, `redis`, the `caller` (this
    process) and what else there is of `ray`."""
    found: Counter[str] = Counter()
    for process in psutil.process_iter(["cmdline", "cpu_times"]):
        command, times = " ".join(process.info["cmdline"] or ()), process.info["cpu_times"]
        kind = "caller" if process.pid == os.getpid() else _kind(command)
        if kind is not None and times is not None:
            found[kind] += times.user + times.system
    return found


def _kind(command: str) -> str | None:
    replica = _REPLICA.search(command)
    if replica is not None:
        return replica[1]
    return next((kind for kind in ("haproxy", "redis", "ray") if kind in command.split(" ")[0]), None)
