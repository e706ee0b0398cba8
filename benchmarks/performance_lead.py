"""First part of docs/performance.md: the hub beside other servers in one table, and what was measured on a GPU."""

from collections.abc import Mapping, Sequence
from typing import Any

from .common import markdown_table
from .servers.report import TITLES, speed

HUB = "karst-hub"
Row = Mapping[str, Any]


def lead(servers: Row, gpu: Row | None) -> list[str]:
    """Return the first paragraphs.

    Args:
        servers: result of `benchmarks.servers`.
        gpu: result of `benchmarks.gpu`, None if it never ran.
    """
    rows = [row for row in servers["rows"] if row["model"] in TITLES and row["form"] == "merged"]
    lines = []
    for model, title in TITLES.items():
        here = [row for row in rows if row["model"] == model]
        for tasks in sorted({row["tasks"] for row in here}):
            lines += _lines(title, tasks, [row for row in here if row["tasks"] == tasks])
    machine = servers["machine"]
    bare = sorted(row["bare_images_per_s"] for row in rows if "bare_images_per_s" in row)
    return [
        "## Speed and memory, beside other servers",
        f"Images per second, latency and memory over HTTP, on {machine['cores']} cores of {machine['cpu']} "
        f"({machine['date'][:10]}), with 16 callers and one image a call. Every task has an adapter of its own; other "
        "servers hold a merged model per task. The second server of each row is the fastest other one. "
        "[servers.md](servers.md) has all servers, their code, tasks that are only heads, and every target.",
        markdown_table(
            [
                "backbone",
                "tasks",
                "images/s",
                "p50",
                "p99",
                "memory",
                "fastest other",
                "images/s",
                "p50",
                "p99",
                "memory",
            ],
            lines,
        ),
        f"Just before each server started, the bare backbone alone reached {bare[0]:.0f} to {bare[-1]:.0f} images per "
        "second: the more these differ, the more other programs used the cores. Where they differ much between two "
        "servers, [servers.md](servers.md) calls a target undecided.",
        *_gpu(gpu),
    ]


def _lines(title: str, tasks: int, rows: Sequence[Row]) -> list[list[str]]:
    own = next((row for row in rows if row["contender"] == HUB and "reason" not in row), None)
    if own is None:
        return []
    others = [row for row in rows if row["contender"] != HUB and "reason" not in row]
    lost = [row for row in rows if row["contender"] != HUB and "reason" in row]
    line = [title, str(tasks), *_figures(own)]
    if others:
        best = max(others, key=speed)
        return [[*line, best["contender"], *_figures(best)]]
    why = lost[0]["reason"].partition(":")[0] if lost else "not measured"
    return [[*line, f"none: {why}", "-", "-", "-", "-"]]


def _figures(row: Row) -> list[str]:
    memory = f"{row['pss_mb'] / 1e3:.2f} GB"
    return [f"{row['images_per_s']:.1f}", f"{row['p50_ms']:.0f} ms", f"{row['p99_ms']:.0f} ms", memory]


def _gpu(gpu: Row | None) -> list[str]:
    if gpu is None:
        return [
            "**No GPU figure was measured here**: the project's machines have none. `make bench-gpu` "
            "(`benchmarks/gpu.py`, about ten minutes on one H100 or H200) checks correctness in float32 and bfloat16 "
            "and measures mixed batches, CUDA graphs and compilation, copies under load, and the whole hub. Only its "
            "small form on a CPU was run, which tests the script."
        ]
    rows = [
        [row["backbone"], row["dtype"], str(row["kernels"]), str(row["batch"]), f"{row['images_per_s']:,.0f}",
         f"{row['mixed_to_frozen']['median']:.2f}"]
        for row in gpu.get("ratio", [])
    ]  # fmt: skip
    return [
        f"On a GPU (`make bench-gpu`, {gpu['card']}, {gpu['machine']['date'][:10]}), mixed batches over frozen ones:",
        markdown_table(["backbone", "dtype", "N", "batch", "images/s", "mixed / frozen"], rows),
    ]
