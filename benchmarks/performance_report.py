"""The benchmarks' results -> docs/performance.md and its plots. Nothing here measures.

python -m benchmarks.performance_report [--results FOLDER] [--docs FOLDER]
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .common import markdown_table

RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parent.parent / "docs"
MIXED_BARS = {("vit_base_patch16_224", 2): 1.05, ("vit_base_patch16_224", 8): 1.15, ("vit_tiny_patch16_224", 2): 1.20}
PEER_NAMES = {
    "ours": "ours, mixed batches",
    "LoRA": "peft LoRA, mixed batches",
    "LoKr": "peft LoKr, a call an adapter",
    "Serve": "Ray Serve, a merged model an adapter",
    "processes": "a process a task",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--docs", type=Path, default=DOCS)
    options = parser.parse_args()
    found = {
        name: json.loads((options.results / f"{name}.json").read_text())
        for name in ("mixed_batch", "engine", "peers", "over_http", "rate_limits", "train_step")
    }
    (options.docs / "img").mkdir(parents=True, exist_ok=True)
    (options.docs / "performance.md").write_text(report(found))
    plot(found["peers"], options.docs / "img" / "peers.png")
    print(f"written to {options.docs / 'performance.md'} and {options.docs / 'img' / 'peers.png'}")


def report(found: dict[str, Any]) -> str:
    """docs/performance.md."""
    parts = [
        "# Performance",
        "Made by `python -m benchmarks.performance_report` from `benchmarks/results/`; do not edit by hand. Every "
        "figure is a ratio or a difference of things measured side by side in one run: medians over rounds, quartiles "
        "in brackets. The machine is shared and noisy, two cores and no GPU, so what a GPU would do was **not** "
        "measured; `--help` of each script says exactly what it does.",
        *_mixed(found["mixed_batch"]),
        *_engine(found["engine"]),
        *_peers(found["peers"]),
        *_http(found["over_http"]),
        *_limits(found["rate_limits"]),
        *_train(found["train_step"]),
        *_images(),
    ]
    return "\n\n".join(parts) + "\n"


def _mixed(result: dict[str, Any]) -> list[str]:
    rows = []
    for row in result["rows"]:
        bar = MIXED_BARS.get((row["backbone"], row["kernels"]))
        ratio = row["mixed_to_frozen"]
        rows.append(
            [
                row["backbone"],
                str(row["kernels"]),
                _value(ratio),
                _value(row["limit_to_frozen"]),
                _value(row["mixed_to_quick"]),
                _value(row["merged_to_frozen"]),
                _bar(bar, ratio, "<="),
            ]
        )
    return [
        "## A batch of eight adapters against the bare backbone",
        f"`python -m benchmarks.mixed_batch` ({_machine(result)}): {result['batch']} images, each with an adapter of "
        "its own (rank 8, factor 8, re-scaling per channel), through `Bank.forward`; beside it the frozen backbone "
        "alone on the same batch, as timm computes it, and eight merged models one after another. Checked against "
        "those. A bank has the frozen weights in the order that oneDNN wants and computes activations in place "
        "(`adapters/serving/prepack.py`), which more "
        "than pays for the adapters: *quick* is the frozen backbone in that form, "
        "without adapters. The limit is what no code that does not merge can go below on these cores: the quick pass, "
        "and the products that KARST adds, each measured in the same round as one plain product of all rows, as if "
        "the images had one adapter between them, with nothing around it.",
        markdown_table(
            ["backbone", "N", "mixed / frozen", "limit", "mixed / quick", "eight merged models / frozen", "bar"], rows
        ),
        "By multiplications alone ViT-B/16 would be at 1.04 with two kernels and at 1.15 with eight, ViT-Ti/16 at 1.12 "
        "with two.",
    ]


def _engine(result: dict[str, Any]) -> list[str]:
    rows = []
    for row in result["rows"]:
        sign = ">=" if row["at_least"] else "<="
        rows.append([row["backbone"], row["what"], _value(row["value"], 2), _bar(row["bar"], row["value"], sign)])
    return [
        "## The worker's engine: many adapters, cold ones, greedy tenants",
        f"`python -m benchmarks.engine` ({_machine(result)}): the adapter cache, batcher and bank of "
        "one worker without HTTP, "
        f"batches of at most {result['batch']}, {result['callers']} callers with one image each in a closed loop.",
        markdown_table(["backbone", "what", "median", "bar"], rows),
        *_greedy(result["rows"]),
        *_zipf(result["rows"]),
    ]


def _greedy(rows: Sequence[dict[str, Any]]) -> list[str]:
    found = next((row for row in rows if row["scenario"] == "greedy"), None)
    if found is None:
        return []
    ms = {name: f"{one['median']:.0f}" for name, one in found["ms"].items()}
    return [
        "A forward pass cannot be interrupted: a call at a busy worker waits for the rest of the "
        "current pass. While one "
        "tenant sends much more than another, passes are short. The tenant below its share then has the next turn for "
        "all its queued images. One tenant offered ten times the worker's capacity "
        f"({found['refused']:.0%} of its calls were refused). The other tenant's median went from {ms['alone_p50']} to "
        f"{ms['beside_p50']} ms, and its p95 from {ms['alone_p95']} to {ms['beside_p95']} ms. Alone it also waits for "
        "its own calls, which arrive at random times."
    ]


def _zipf(rows: Sequence[dict[str, Any]]) -> list[str]:
    found = next((row for row in rows if row["scenario"] == "zipf" and "store_reads" in row), None)
    if found is None:
        return []
    calls = found["hits"] + found["loads"]
    return [
        f"In the Zipf traffic {found['loads'] / calls:.0%} of the calls had to load their adapter, and "
        f"{found['store_reads'] / calls:.0%} read its file. Reading, checking and packing take time of the same two "
        "cores that the passes use."
    ]


def _peers(result: dict[str, Any]) -> list[str]:
    rows, reasons = [], []
    for row in result["rows"]:
        for name, entry in row["contenders"].items():
            speed, memory = entry["images_per_s"], entry["memory_mb"]
            rows.append(
                [
                    str(row["adapters"]),
                    PEER_NAMES[name],
                    f"{speed['median']:.1f}" if speed else "-",
                    _value(entry["time_to_ours"]) if entry["time_to_ours"] else "-",
                    f"{memory['private']:,.0f}" if memory else "-",
                ]
            )
            if entry["reason"]:
                reasons.append(f"- {row['adapters']} adapters, {PEER_NAMES[name]}: {entry['reason']}")
    return [
        "## Beside other ways to serve many adapters",
        f"`python -m benchmarks.peers` ({_machine(result)}): {result['backbone']}, batches of {result['batch']}, the "
        "adapters round robin. LoRA and LoKr are Hugging Face's peft with as many numbers on the same layers; a merged "
        "model or a process is a whole backbone. Memory is what the adapters add beside a backbone in use, private to "
        "the process. peft's adapters are copied in, layer by layer, since its own `add_adapter` takes longer the more "
        "there are; Serve gets its images by number and loads models by a copy in memory: both are favoured so.",
        markdown_table(["adapters", "", "images a second", "time / ours", "MB added"], rows),
        *(["\n".join(["Not run:", "", *reasons])] if reasons else []),
        "![Images a second and memory against the number of adapters](img/peers.png)",
    ]


def _http(result: dict[str, Any]) -> list[str]:
    parts = [
        "## Over HTTP",
        f"`python -m benchmarks.over_http` ({_machine(result)}): a hub with its default settings and one worker (demo "
        "backbone; ViT-B/16 with random weights for saturation), callers on plain sockets on the same two cores, and "
        "in the same Ray cluster an empty application of the same two hops. *Bare* is the backbone as timm computes "
        "it. A tenant's p95 alone is that of one call after another on an idle hub.",
        markdown_table(
            ["what", "median", "bar"],
            [
                [name, f"{bar['value']:.2f}", f"{bar['bar']:g}: {'holds' if bar['holds'] else '**does not hold**'}"]
                for name, bar in result["bars"].items()
            ],
        ),
    ]
    if "idle" in result:
        ms = {name.removesuffix("_ms"): one["median"] for name, one in result["idle"].items() if name.endswith("_ms")}
        rows = [
            ["the whole call", ms["call"]],
            ["proxy and gateway (`GET /healthz`)", ms["healthz"]],
            ["handle and worker (the empty application, less that)", ms["empty"] - ms["healthz"]],
            ["decoding the image", ms["decode"]],
            ["waiting for the pass (load and queue)", ms["load"] + ms["queue"]],
            ["the pass in the worker", ms["compute"]],
            ["of that a bare forward pass", ms["bare"]],
            ["the rest: key, task, routing, answer", ms["rest"]],
        ]
        parts += [
            "Where an idle call's milliseconds go (medians, so they do not add up exactly):",
            markdown_table(["", "ms"], [[what, f"{value:.1f}"] for what, value in rows]),
        ]
    if "throughput" in result:
        found = result["throughput"]
        per_second = ", ".join(f"{name} {one['median']:.0f}" for name, one in found["per_second"].items())
        parts.append(
            f"Requests per second with {found['callers']} callers: {per_second}. `bare` is the backbone alone in one "
            "process; `work` is one process that decodes and uses an adapter. All parts share these cores. A hub that "
            "added only the bare pass to the empty application would reach "
            f"{_value(found['ceiling']['bare'])} of its rate; with decoding and adapters, "
            f"{_value(found['ceiling']['work'])}. The hub, with its keys, limits, fairness and metrics, reaches "
            f"{_value(found['to_ceiling']['bare'])} of the first limit and "
            f"{_value(found['to_ceiling']['work'])} of the "
            "second."
        )
        hub, empty = found["cpu_ms"]["hub"], found["cpu_ms"]["empty"]
        kinds = sorted(hub, key=lambda kind: -hub[kind])
        parts += [
            "Milliseconds of a core that a call takes then, of each kind of process:",
            markdown_table(["", "hub", "empty"], [[k, f"{hub[k]:.2f}", f"{empty.get(k, 0):.2f}"] for k in kinds]),
        ]
    if "saturation" in result:
        found = result["saturation"]
        work = ", ".join(f"{_value(found[f'{n} adapters']['to_work'])} with {n}" for n in (1, 8))
        parts.append(
            "At saturation the cores also decode JPEGs and compute the adapters' part; a bank computes the frozen part "
            "faster than timm. One process with the same work and without HTTP reaches "
            f"{_value(found['work']['to_bare'])} of the bare backbone's images per second. The hub reaches "
            f"{work} adapters of that rate."
        )
    if "tenants" in result:
        flood, large = (result["tenants"][f"{n} images"] for n in (1, 16))
        ms = {
            (found is flood, name): f"{one['median']:.0f}"
            for found in (flood, large)
            for name, one in found["p95_ms"].items()
        }
        parts.append(
            f"The greedy tenant offered {flood['offered_calls_per_second']:.0f} calls of one image "
            "per second, ten times "
            "the hub's capacity. HAProxy refuses a key's calls beyond 512 open ones, so the gateway handles only the "
            "accepted calls. The other tenant's images have the next turn in a short pass. The load generator and the "
            "refusals share the same two cores. The other tenant's p95 went from "
            f"{ms[True, 'hub alone']} to {ms[True, 'hub beside']} ms. With the same load on the empty application, the "
            f"p95 of its calls went from {ms[True, 'empty alone']} to {ms[True, 'empty beside']} ms, "
            f"{_value(flood['empty_ratio'])} times. Beside calls of 16 images the p95 went from "
            f"{ms[False, 'hub alone']} to {ms[False, 'hub beside']} ms at the hub, and from "
            f"{ms[False, 'empty alone']} to {ms[False, 'empty beside']} ms "
            f"({_value(large['empty_ratio'])} times) at the "
            "empty application."
        )
    if "first-answer" in result:
        first = result["first-answer"]["first_answer_ms"]
        parts.append(
            f"From `register` returning to the new adapter's first correct answer: {first['median']:.1f} ms "
            f"({first['q1']:.1f} to {first['q3']:.1f})."
        )
    return parts


def _limits(result: dict[str, Any]) -> list[str]:
    cells = {(row["redis"], row["limits"], row["call"]): row for row in result["rows"]}
    columns = [(name, limits) for name in ("p50", "p99", "cpu") for limits in ("leases", "script")]

    def ms(redis: str, limits: str, call: str, name: str) -> float:
        row = cells[redis, "redis" if limits == "script" else limits, call]
        return float(row[f"{name}_ms"]["median"])

    kinds = list(dict.fromkeys((redis, call) for redis, _, call in cells))
    rows = [[*kind, *(f"{ms(kind[0], limits, kind[1], name):.3f}" for name, limits in columns)] for kind in kinds]
    default = {column: ms("embedded", column[1], "classification", column[0]) for column in columns}
    ratios = [
        ms(redis, "script", call, "cpu") / ms(redis, "leases", call, "cpu") for redis, call in kinds if "each" in redis
    ]
    return [
        "## Rate limits",
        f"`python -m benchmarks.rate_limits` ({_machine(result)}): the time that one call waits for its tenant's "
        f"limits, {result['rounds']} rounds of {result['calls']} calls, one call after another. With leases a gateway "
        "takes tokens from Redis in lots and spends them itself. The alternative is one script call (GCRA) per check. "
        "A request has one check, a classification has two and a release.",
        markdown_table(["Redis", "call", *(f"{name}, {limits}" for name, limits in columns)], rows),
        "All times are milliseconds; `cpu` is the gateway's processor time per call.",
        "The hub keeps its leases: the alternative had to wait less than 0.5 ms at p50, and a classification waits "
        f"{default['p50', 'script']:.2f} ms for it with the embedded Redis (leases: {default['p50', 'leases']:.3f} ms) "
        f"and costs {default['cpu', 'script']:.2f} ms of processor time (leases: {default['cpu', 'leases']:.2f} ms). "
        "The hub starts that Redis by default, and it syncs each write to disk. With a sync each second the "
        f"alternative waits less than 0.5 ms, but costs {min(ratios):.0f} to {max(ratios):.0f} times as much processor "
        "time as leases.",
    ]


def _train(result: dict[str, Any]) -> list[str]:
    rows = []
    for row in result["rows"]:
        for name, ms in row["ms"].items():
            ratio = row["to_ours"].get(name)
            memory = f"{row['memory_mb'][name] / 1000:.1f} GB"
            rows.append(
                [str(row["kernels"]), name, _value(ratio) if ratio else "1", f"{ms['median'] / 1e3:.0f}", memory]
            )
    return [
        "## A training step",
        f"`python -m benchmarks.train_step` ({_machine(result)}): forward, backward and AdamW on {result['backbone']}, "
        f"batch {result['batch']}, {result['rounds']} rounds, interleaved, on the same layers with equally many "
        "numbers. The official form writes dW out by `kron` and calls `F.linear` (a plain version that runs; it and "
        "ours agree in logits and gradients). Ours writes W0 + dW out going forward, too, but takes the gradients of "
        "C, A and B by the vec trick: through dW they need a third full product of all rows.",
        markdown_table(["N", "", "time / ours", "seconds", "peak memory"], rows),
        "Where the quartiles are far apart, other work ran beside: trust those figures less.",
    ]


def _images() -> list[str]:
    return [
        "## Images",
        "Pixels are timm's own evaluation transform's, bit for bit, but for JPEGs whose shorter side is at least six "
        "times what the backbone needs: Pillow decodes those to a half, a quarter or an eighth, to at least three "
        "times what is needed. On photographs of solar cells (enlarged, with noise, quality 90) the 224-pixel result "
        "then differs by 0.2 of 255 on average and 3 at most, and decoding takes 15 instead of 33 ms at 2000 x 1500 "
        "pixels, 65 instead of 326 ms at 5333 x 4000. A test holds that no label of the committed samples changes. "
        "Training and evaluation decode by the same function.",
    ]


def plot(result: dict[str, Any], path: Path) -> None:
    """Images a second and memory against the number of adapters."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for name, title in PEER_NAMES.items():
        rows = [(row["adapters"], row["contenders"].get(name)) for row in result["rows"]]
        there = [(size, entry) for size, entry in rows if entry and entry["images_per_s"]]
        sizes = [size for size, _ in there]
        left.plot(sizes, [entry["images_per_s"]["median"] for _, entry in there], marker="o", label=title)
        right.plot(sizes, [max(entry["memory_mb"]["private"], 0.1) for _, entry in there], marker="o", label=title)
    for axes, label in ((left, "images a second"), (right, "MB added")):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("adapters")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    left.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def _value(found: dict[str, float], digits: int = 2) -> str:
    return f"{found['median']:.{digits}f} ({found['q1']:.{digits}f}-{found['q3']:.{digits}f})"


def _bar(bar: float | None, found: dict[str, float], sign: str) -> str:
    if bar is None:
        return ""
    holds = found["median"] >= bar if sign == ">=" else found["median"] <= bar
    return f"{sign} {bar:g}: {'holds' if holds else '**does not hold**'}"


def _machine(result: dict[str, Any]) -> str:
    machine = result["machine"]
    return f"{machine['cores']} cores of {machine['cpu']}, torch {machine['torch']}, {machine['date'][:10]}"


if __name__ == "__main__":
    main()
