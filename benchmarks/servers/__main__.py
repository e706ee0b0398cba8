"""The hub beside other model servers, over HTTP: images per second, latency, memory, and the time to add a task.

    python -m benchmarks.servers [--contenders NAME ...] [--models vit_s14 vit_b16] [--sizes 1 8 64 512]
        [--rounds 3] [--again]

Each contender runs alone on the machine's cores, beside the load generator (`benchmarks.load`), which calls it with the
same images. It serves the same random KARST adapters (N = 2, rank 8) in one of two forms:

* merged: rivals hold one merged model per task, as their documentation shows for many models. The hub holds adapters.
* heads: every task is only a classifier on one frozen backbone. Rivals compute the batch of all tasks in one pass.

A contender starts once per form, with one task, and then gets more: a rival by a new file, the hub by a registration.
At each size every task is called once (for at most `warm_up_s`); then one caller measures the latency alone, and
`callers` in a closed loop measure images per second and latency under load, with one image a call and tasks in a random
order. The first answers are compared with those of the merged model. Before each start two speeds show how fast the
machine was at that time: `bare` is timm's backbone without a server, in batches of 8. `bank`, before a start of the
hub, is its bank with the tasks' adapters without a server: two threads at once, each with half of the cores and half of
the callers' images, as a worker computes batches of several calls. A call also takes the time of an empty application
on Ray Serve, and decodes its image: `call_ms` of a core, in the same run.

With several rounds the contenders of a form take turns. The result is the round with the median images per second.

Rivals need `benchmarks/servers/install.sh`. Results are kept after each size: a stopped run continues, and --again
measures once more. A size whose models do not fit in the free memory is not run, and has a reason instead.
"""

import argparse
import json
import random
import signal
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import Any

import psutil
from rich import box
from rich.console import Console
from rich.table import Table

from ..bare import times_per_second
from ..common import machine
from ..cores import busy_s
from ..load import Connection, Reply, closed_loop, ok, rate
from .estimate import bank_rate, call_ms
from .inputs import DISTINCT, IMAGES, MODELS, Form, Inputs
from .sides import SIDES, Side, missing, pss_mb, running

OUTPUT = Path(__file__).parents[1] / "results" / "servers.json"
RIVALS = Path(__file__).parents[2] / ".venv-servers"
HUB = "karst-hub"
SIZES = (1, 8, 64, 512)
FORMS: tuple[Form, ...] = ("merged", "heads")
CHECKED = 16  # answers
TOLERANCE = 2e-3  # between two scores
RESERVE_MB = 2500  # of memory that stays free
RAY_SHARE = 0.6  # of the free memory that Ray Serve's models may take
NEW_TASKS = 3
ALONE_S = 1.5
SECONDS_PER_START = 20  # beside the windows


def main() -> None:
    """Measure all that is missing, print a table, write the JSON file after each size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contenders", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["vit_s14", "vit_b16"])
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS)
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES, help="numbers of tasks")
    parser.add_argument("--rounds", type=int, default=1, help="starts of each contender")
    parser.add_argument("--again", action="store_true", help="measure also what the result has")
    parser.add_argument("--rivals", type=Path, default=RIVALS, help="environment of install.sh")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # otherwise a server would outlive this process
    result = json.loads(options.output.read_text()) if options.output.exists() else {"rows": []}
    forms = groupby(wanted(result["rows"], options), key=itemgetter(1, 2))
    starts = [start for _, group in forms for start in [*group] * options.rounds]
    seconds = sum(expected_s(model, sizes) for _, model, _, sizes in starts)
    print(f"{len(starts)} starts, about {seconds / 60:.0f} minutes", flush=True)
    rounds: defaultdict[tuple[str, str, str, int], list[dict[str, Any]]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        inputs_of = lru_cache(maxsize=1)(lambda model, form: Inputs(MODELS[model], form, Path(folder) / model))
        for number, (name, model, form, sizes) in enumerate(starts, 1):
            about = f"about {expected_s(model, sizes):.0f} s"
            print(f"[{number}/{len(starts)}] {name}, {model}, {form}: {about}", flush=True)
            for row in measure(name, inputs_of(model, form), sizes, options.rivals):
                row = {"contender": name, "model": model, "form": form, **row}
                rounds[key(row)].append(row)
                result["rows"] = [one for one in result["rows"] if key(one) != key(row)] + [middle(rounds[key(row)])]
                result["machine"] = machine()
                options.output.parent.mkdir(parents=True, exist_ok=True)
                options.output.write_text(json.dumps(result, indent=1) + "\n")
                print(f"    {row['tasks']} tasks: {told(row)}", flush=True)
    Console().print(table(result["rows"]))
    print(f"written to {options.output}")


def key(row: dict[str, Any]) -> tuple[str, str, str, int]:
    return row["contender"], row["model"], row["form"], row["tasks"]


def middle(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the row of the round with the median speed, with the speeds of all rounds."""
    not_run = [row for row in rounds if "reason" in row]
    if not_run or len(rounds) == 1:
        return [*not_run, *rounds][0]
    speeds = [row["images_per_s"] for row in rounds]
    return rounds[speeds.index(statistics.median_low(speeds))] | {"rounds_images_per_s": speeds}


def wanted(rows: Sequence[dict[str, Any]], options: argparse.Namespace) -> Iterator[tuple[str, str, Form, list[int]]]:
    """Yield each start with the sizes that are missing. One task is the same in both forms for a rival."""
    there = set() if options.again else {key(row) for row in rows}
    for model in options.models:
        for form in options.forms:
            for name in options.contenders:
                sizes = [size for size in options.sizes if (name, model, form, size) not in there]
                if form == "heads":
                    sizes = [size for size in sizes if size > 1]
                if sizes:
                    yield name, model, form, sizes


def expected_s(model: str, sizes: Sequence[int]) -> float:
    one = MODELS[model]
    return SECONDS_PER_START + sum(ALONE_S + one.seconds + min(size / 10, one.warm_up_s) for size in sizes)


def measure(name: str, inputs: Inputs, sizes: Sequence[int], rivals: Path) -> Iterator[dict[str, Any]]:
    """Start one contender and yield a row per size; a row that could not be measured has a `reason`."""
    reason = missing(name, rivals)
    if reason is not None:
        yield from ({"tasks": size, "reason": f"not installed: {reason}"} for size in sizes)
        return
    base: dict[str, Any] = {"model_mb": round(inputs.task_file(0).stat().st_size / 1e6, 2)}
    for number in range(min(DISTINCT, max(sizes))):  # before the start: making them takes the cores
        inputs.task_file(number)
        inputs.expected(number, number)
    base["bare_images_per_s"] = round(bare_rate(inputs), 2)
    if name == HUB:
        base |= {"bank_images_per_s": round(bank_rate(inputs, min(sizes)), 2), "call_ms": round(call_ms(inputs), 2)}
        base["cores"] = machine()["cores"]
    free_mb = psutil.virtual_memory().available / 1e6
    kept = max(1, min(max(sizes), int(RAY_SHARE * free_mb / max(base["model_mb"], 0.1))))
    done: list[int] = []
    with tempfile.TemporaryDirectory() as folder:
        side = SIDES[name](inputs, Path(folder) / "server", rivals, kept)
        try:
            with running(side, Path(folder) / "log") as (tree, start_s):
                base |= {"start_s": round(start_s, 1), "base_pss_mb": pss_mb(tree), "date": machine()["date"]}
                for size in sizes:
                    reason = too_large(name, inputs.form, size, base, tree)
                    row = {"reason": reason} if reason else one_size(side, size, tree)
                    done.append(size)
                    yield {**base, "tasks": size, **row}
        except (RuntimeError, OSError) as error:
            left = [size for size in sizes if size not in done]
            yield from ({**base, "tasks": size, "reason": f"failed: {error}"} for size in left)


def bare_rate(inputs: Inputs, seconds: float = 2.0) -> float:
    """Return the images per second of timm's backbone in batches of eight."""
    return 8 * times_per_second(lambda: inputs.bare_pass(8), seconds)


def too_large(name: str, form: Form, size: int, base: dict[str, Any], tree: psutil.Process) -> str | None:
    """Return why a rival cannot hold this many merged models; Ray Serve drops the least recently used instead."""
    if form == "heads" or name in (HUB, "Ray Serve"):
        return None
    workers = psutil.cpu_count() or 1 if name == "LitServe" else 1
    need = workers * size * base["model_mb"] + base["base_pss_mb"]
    free = psutil.virtual_memory().available / 1e6 + pss_mb(tree) - RESERVE_MB
    if need <= free:
        return None
    copies = f"{size} models of {base['model_mb']:.0f} MB" + (f" in {workers} processes" if workers > 1 else "")
    total = psutil.virtual_memory().total / 1e9
    return f"out of memory: {copies} need {need / 1e3:.1f} GB; the machine has {total:.1f} GB, {free / 1e3:.1f} GB free"


def one_size(side: Side, size: int, tree: psutil.Process) -> dict[str, Any]:
    """Measure a running server with this many tasks.

    Raises:
        RuntimeError: an answer is wrong, or a call failed.
    """
    model = side.inputs.model
    began = time.perf_counter()
    side.with_tasks(size)
    added_s = time.perf_counter() - began
    check(side, size)
    images = side.inputs.images
    warm = [side.message(task, images[task % IMAGES]) for task in range(size)]
    called = call_each(side, warm, model.warm_up_s)
    order = random.Random(0).sample(range(max(size, 2048)), k=min(max(size, 2048), 2048))
    calls = [side.message(number % size, images[i % IMAGES]) for i, number in enumerate(order)]
    closed_loop(side.address, calls, model.callers, 1.0)
    alone = [ok(reply).ms for reply in closed_loop(side.address, calls, 1, ALONE_S)]
    for seconds in (model.seconds, 4 * model.seconds):
        began, busy_before_s = time.perf_counter(), busy_s()
        replies = closed_loop(side.address, calls, model.callers, seconds)
        cores_used = (busy_s() - busy_before_s) / (time.perf_counter() - began)
        if len(replies) >= 4 * model.callers:  # a slow server gets a longer window
            break
    ms = [ok(reply).ms for reply in replies[model.callers : -model.callers] or replies]
    quantiles = statistics.quantiles(ms, n=100, method="inclusive")
    row = {
        "images_per_s": round(rate(replies, model.callers), 2),
        "p50_ms": round(quantiles[49], 2),
        "p99_ms": round(quantiles[98], 2),
        "cores_used": round(cores_used, 2),
        "calls": len(replies),
        "alone_p50_ms": round(statistics.median(alone), 2),
        "pss_mb": pss_mb(tree),
        "tasks_called": called,
        "added_s": round(added_s, 2),
    }
    return row | {"add_ms": round(statistics.median(add_ms(side, size, n) for n in range(NEW_TASKS)), 1)}


def check(side: Side, size: int) -> None:
    """Compare answers with those of merged models.

    Raises:
        RuntimeError: an answer is wrong.
    """
    tasks = sorted({i * (size - 1) // (CHECKED - 1) for i in range(CHECKED)})
    pairs = [(task, task % DISTINCT) for task in tasks]
    rights = [side.inputs.expected(task, image) for task, image in pairs]
    connection = Connection(side.address)
    for (task, image), (right, expected) in zip(pairs, rights, strict=True):
        label, score = side.answer(ok(connection.call(side.message(task, side.inputs.images[image]))))
        if label != right or abs(score - expected) > TOLERANCE:
            raise RuntimeError(f"task {task} answered {label} {score:.4f}, the merged model {right} {expected:.4f}")
    connection.close()


def call_each(side: Side, messages: Sequence[bytes], limit_s: float) -> int:
    """Call each task once, with four callers, until the limit; return the number of calls."""
    called, began = 0, time.perf_counter()
    batches = iter(messages)
    while (some := list(islice(batches, 16))) and time.perf_counter() - began < limit_s:
        connections = [Connection(side.address) for _ in some]
        for connection, message in zip(connections, some, strict=True):
            connection.send(message)
        for connection in connections:
            ok(reply_of(connection))
            connection.close()
        called += len(some)
    return called


def reply_of(connection: Connection) -> Reply:
    while (reply := connection.receive()) is None:
        pass
    return reply


def add_ms(side: Side, size: int, number: int) -> float:
    """Return the milliseconds from new weights to the first answer of their task, on an idle server."""
    task = 100_000 * (number + 1) + size
    message = side.message(task, side.inputs.images[0])
    side.prepare(task)
    connection = Connection(side.address)
    began = time.perf_counter()
    side.add(task)
    ok(connection.call(message))
    taken = time.perf_counter() - began
    connection.close()
    return 1e3 * taken


def told(row: dict[str, Any]) -> str:
    if "reason" in row:
        return str(row["reason"])
    return (
        f"{row['images_per_s']:.1f} images/s, p50 {row['p50_ms']:.0f} ms, p99 {row['p99_ms']:.0f} ms, "
        f"alone {row['alone_p50_ms']:.1f} ms, {row['pss_mb']:.0f} MB, a new task in {row['add_ms']:.0f} ms"
    )


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """Return all rows for a terminal."""
    out = Table("model", "form", "tasks", "contender", "images/s", "p50", "p99", "alone", "MB", box=box.SIMPLE_HEAD)
    for row in sorted(rows, key=lambda row: (row["model"], row["form"], row["tasks"])):
        names = [row["model"], row["form"], str(row["tasks"]), row["contender"]]
        if "reason" in row:
            out.add_row(*names, row["reason"][:60])
        else:
            numbers = (row[name] for name in ("images_per_s", "p50_ms", "p99_ms", "alone_p50_ms", "pss_mb"))
            out.add_row(*names, *(f"{number:.1f}" for number in numbers))
    return out


if __name__ == "__main__":
    main()
