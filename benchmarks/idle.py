"""A hub without calls: seconds to ready, share of a core, and memory by process; and the memory of 1,000 tasks.

    python -m benchmarks.idle [--seconds 60] [--output FILE]

It runs `karst-hub serve` with the demo backbone, default settings and an empty home. `ready` is the time until the
command logs that it is ready, and `start_cpu_s` the CPU time of the whole machine in it. Then the hub is idle for a
minute. Then CPU time is counted for `--seconds` (/proc), and memory is the proportional set size (PSS) at their end:
pages that several processes share count once in all. Other programs that run the same files, such as another hub on
this machine, make PSS smaller, so this script imports torch only afterwards. `file_mb` is the part of the PSS that is
pages of files, such as torch's libraries: the kernel drops these when it needs memory. The result has the load
average before and after.

Then a client registers a head of ten classes as each of `WARM_UP` tasks, classifies once with each, and does the same
with 1,000 more. `tasks_mb` is what these 1,000 add to the memory of the gateway alone (unique set size).
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import psutil

from hub.admin_schemas import LimitsChange
from hub.client.client import Client
from hub.local.bootstrap import DEFAULT_TENANT, KEYS_FILE
from hub.local.ports import free_port

from .cores import busy_s, by_process, used_s

OUTPUT = Path(__file__).parent / "results" / "idle.json"
BARS = {"ready_s": 12.0, "core": 0.05, "pss_mb": 1500.0, "tasks_mb": 5.0}
TASKS, WARM_UP = 1000, 200
FIGURES = ("core", "pss_mb", "file_mb")
SETTLE_S = 60.0
READY = b"ready; press Ctrl-C to stop"
# Part of a process's command -> its name in the table. The first match counts. The raylet's command has its agent's.
NAMES = {
    "karst-hub:worker": "worker",
    "karst-hub:gateway": "gateway",
    "ServeController": "Serve: controller",
    "HAProxyManager": "Serve: manager of HAProxy",
    "ProxyActor": "Serve: fallback proxy",
    "DashboardAgent": "Ray: raylet and agent of metrics",
    "dashboard/agent.py": "Ray: raylet and agent of metrics",
    "RuntimeEnvAgent": "Ray: agent of environments",
    "runtime_env/agent": "Ray: agent of environments",
    "gcs_server": "Ray: GCS",
    "redis": "Redis",
    "karst-hub serve": "command",
    "haproxy": "HAProxy",
}


def main() -> None:
    """Measure, print the table, write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=60.0, help="in which CPU time is counted")
    parser.add_argument("--settle", type=float, default=SETTLE_S, help="idle seconds before")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    load = [os.getloadavg()[0]]
    found = measure(options.settle, options.seconds)
    from .common import machine

    result = {"machine": machine(), "seconds": options.seconds, "load": [*load, os.getloadavg()[0]], **found}
    result["bars"] = {
        name: {"value": found[name], "bar": bar, "holds": found[name] <= bar} for name, bar in BARS.items()
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    print(*report(result), sep="\n\n")
    print(f"written to {options.output}")


def measure(settle_s: float, seconds: float) -> dict[str, Any]:
    """Run a hub, and return its seconds to ready, share of a core and memory, and the memory of 1,000 tasks."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HUB_")}
    command = [str(Path(sys.executable).with_name("karst-hub")), "serve"]
    with tempfile.TemporaryDirectory() as home, tempfile.TemporaryFile() as log:
        port = free_port()
        environment |= {"HUB_HOME": home, "HUB_BACKBONE": "demo", "HUB_PORT": str(port)}
        started_s, busy_before_s = time.monotonic(), busy_s()
        process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            while READY not in os.pread(log.fileno(), 1 << 20, 0):
                if process.poll() is not None:
                    raise RuntimeError(os.pread(log.fileno(), 1 << 20, 0).decode(errors="replace"))
                time.sleep(0.05)
            ready_s, start_cpu_s = time.monotonic() - started_s, busy_s() - busy_before_s
            time.sleep(settle_s)
            before, since_s = cpu_s(process.pid), time.monotonic()
            time.sleep(seconds)
            after, took_s = cpu_s(process.pid), time.monotonic() - since_s
            processes: dict[str, dict[str, float]] = defaultdict(lambda: dict.fromkeys(FIGURES, 0.0))
            for name, taken_s in used_s(before, after).items():
                processes[name]["core"] = taken_s / took_s
            for pid, (name, _) in after.items():
                for figure, size_mb in memory_mb(pid).items():
                    processes[name][figure] += size_mb
            gateway = next(pid for pid, (name, _) in after.items() if name == "gateway")
            lines = (Path(home) / KEYS_FILE).read_text().splitlines()
            tasks_mb = memory_of_tasks(f"http://127.0.0.1:{port}", dict(line.split("=", 1) for line in lines), gateway)
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(timeout=120)
    total = {key: sum(own[key] for own in processes.values()) for key in FIGURES}
    rows = sorted(processes.items(), key=lambda item: -item[1]["pss_mb"])
    return {
        "ready_s": round(ready_s, 1),
        "start_cpu_s": round(start_cpu_s, 1),
        "core": round(total["core"], 4),
        "pss_mb": round(total["pss_mb"]),
        "file_mb": round(total["file_mb"]),
        "tasks_mb": round(tasks_mb, 1),
        "processes": {name: {key: round(value, 4) for key, value in own.items()} for name, own in rows},
    }


def memory_of_tasks(url: str, keys: dict[str, str], gateway: int) -> float:
    """Return by how many megabytes 1,000 tasks enlarge the gateway, each registered and used once."""
    from adapters import KarstConfig, load_backbone

    from .bare import pictures
    from .common import copy_of, random_adapter

    head = random_adapter(load_backbone("demo"), KarstConfig(kernels=0, rescale="none"))
    (picture,) = pictures(64, 1)
    with Client(url, keys["HUB_ADMIN_KEY"]) as admin:
        admin.change_limits(DEFAULT_TENANT, LimitsChange(tasks=10 * TASKS, requests_per_second=1e6))
    sizes = []
    with Client(url, keys["HUB_KEY"]) as client:
        for numbers in (range(WARM_UP), range(WARM_UP, WARM_UP + TASKS)):
            for i in numbers:
                client.register(f"task{i}", copy_of(head, i).data)
                client.classify(f"task{i}", picture)
            sizes.append(psutil.Process(gateway).memory_full_info().uss)
    return (sizes[1] - sizes[0]) / 1e6


def cpu_s(root: int) -> dict[int, tuple[str, float]]:
    """Return the name and the CPU time so far of a process and each of its descendants, by id."""

    def name_of(process: psutil.Process) -> str:
        command = " ".join(process.cmdline())
        return next((name for part, name in NAMES.items() if part in command), "others")

    top = psutil.Process(root)
    return by_process([top, *top.children(recursive=True)], name_of)


def memory_mb(pid: int) -> dict[str, float]:
    """Return the proportional set size of a process and the part of files, in megabytes of 10^6 bytes."""
    lines = (line.split() for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
    found = {name.rstrip(":"): int(size) * 1024 / 1e6 for name, size, *_ in lines}
    return {"pss_mb": found["Pss"], "file_mb": found["Pss_File"]}


def report(result: dict[str, Any]) -> list[str]:
    """Return the section of docs/performance.md."""
    from .common import markdown_table

    machine = result["machine"]
    bars, start_s = result["bars"], result["start_cpu_s"]

    def bar(name: str, unit: str) -> str:
        found = bars[name]
        holds = "holds" if found["holds"] else "**does not hold**"
        return f"{found['value']:g} {unit} (target at most {found['bar']:g}: {holds})"

    rays = [own for name, own in result["processes"].items() if name.startswith(("Ray:", "Serve:"))]
    core, memory = (sum(own[value] for own in rays) for value in ("core", "pss_mb"))
    return [
        "## An idle hub",
        f"`python -m benchmarks.idle` ({machine['cores']} cores of {machine['cpu']}, {machine['date'][:10]}): "
        "`karst-hub serve` with the demo backbone and default settings, a minute after its start, over "
        f"{result['seconds']:g} seconds. Ready after {bar('ready_s', 's')}; {bar('core', 'of a core')}; "
        f"{bar('pss_mb', 'MB')} of memory (PSS of all processes), of which {result['file_mb']} MB are pages of files, "
        "most of them torch's libraries; the kernel drops these when it needs memory. The load average was "
        f"{result['load'][0]:.1f} before and {result['load'][1]:.1f} after. The start takes {start_s:.1f} s of CPU "
        f"time, {start_s / machine['cores']:.1f} s on cores that are never idle. Then "
        "1,000 tasks, each with a head of ten classes that was called once, add "
        f"{bar('tasks_mb', 'MB')} to the memory of the gateway.",
        markdown_table(
            ["process", "memory, MB", "of files, MB", "share of a core"],
            [
                [name, f"{own['pss_mb']:.0f}", f"{own['file_mb']:.0f}", f"{own['core']:.4f}"]
                for name, own in result["processes"].items()
            ],
        ),
        f"Ray's and Serve's own processes, without gateway and worker, take {core:.4f} of a core and {memory:.0f} MB: "
        "no hub on Ray Serve takes less.",
    ]


if __name__ == "__main__":
    main()
