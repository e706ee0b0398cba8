"""The hub over HTTP, compared with the bare backbone and an empty Ray Serve application in the same run.

    python -m benchmarks.over_http [--parts idle throughput ...] [--calls 200] [--rounds 5] [--output FILE]

* idle: the latency that a call adds, and its parts. One call at a time runs in turn: a bare forward pass of one image,
  an empty two-hop application in the same Ray cluster, the hub's `GET /healthz`, and the hub's call.
* throughput: requests per second of 16 callers, hub and empty application in turn. Beside them images per second of one
  process: `bare` runs the backbone alone, `work` decodes and runs a pass with an adapter. `ceiling` is the ratio to the
  empty application of a hub that adds only one of these to it, on the same cores.
* first-answer: time from the return of `register` to the first correct answer of an adapter that no worker has loaded.
* tenants: the p95 of a tenant that sends one image at a time, alone, and while another tenant offers ten times the
  hub's throughput, with one image per call and with 16. A refused call counts as two minutes. The empty application
  gets the same bytes at the same rates.
* saturation: images per second of a large backbone (random weights, JPEG), with one adapter and eight. In turn with it
  one process runs the bare backbone in batches of the best size, with one thread per core, while the hub is idle. The
  same process also decodes and uses eight adapters (`work`), which every hub has to do.

Contenders take turns, so noise affects them equally. A ratio is the median over rounds of the ratio within a round. The
hub has its default settings, one worker and an embedded Redis. The load comes from plain sockets (`benchmarks.load`)
and shares the cores with everything else. `cpu_ms` is the CPU time per call of each kind of process.
"""

import argparse
import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import httpx
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from adapters import Adapter
from hub.client.client import Client

from . import bare, cores
from .beside import EMPTY, TENANTS, Hub, hub_beside_empty
from .common import copy_of, machine, spread
from .load import Connection, closed_loop, ok, open_loop, p95, rate, rate_of_passes, request

OUTPUT = Path(__file__).parent / "results" / "over_http.json"
PARTS = ("idle", "throughput", "first-answer", "tenants", "saturation")
WARM_UP = 30
NEW_ADAPTERS = 20
GREED = 10
GREEDY_IMAGES = (1, 16)
SETTLE_S = 1.0
TUNE_S = 10.0  # of the load of throughput, before it is measured: a worker finds its batch size in about five seconds
ROLES = {
    **{f"ServeReplica:{app}:{role}": role for app in ("karst-hub", "empty") for role in ("worker", "gateway")},
    **{part: part for part in ("haproxy", "redis", "ray")},
}
# name: (path in the result, target, True if the value must be at most the target)
BARS = {
    "an idle call adds, ms (p50)": (("idle", "added_ms", "median"), 8.0, True),
    "requests a second / empty with decoding and a pass": (("throughput", "to_ceiling", "work", "median"), 0.9, False),
    "CPU of the gateway / empty gateway plus decoding": (("throughput", "gateway_ratio", "median"), 1.25, True),
    "p95 beside a greedy tenant / alone": (("tenants", "1 images", "ratio", "median"), 1.5, True),
    "p95 beside greedy calls of 16 images / alone": (("tenants", "16 images", "ratio", "median"), 2.5, True),
    "images a second, one adapter / bare": (("saturation", "1 adapters", "to_bare", "median"), 0.95, False),
    "images a second, eight adapters / bare": (("saturation", "8 adapters", "to_bare", "median"), 0.95, False),
}


@dataclass(frozen=True)
class Stage:
    """A running hub, its empty neighbour, and the parts' shared inputs."""

    hub: Hub
    bare: bare.Process
    backbone: str
    adapters: Sequence[bytes]
    pictures: Sequence[bytes]

    def classify(self, task: int = 0, picture: int = 0, tenant: str = TENANTS[0]) -> bytes:
        """Return a request; task i has adapter i, for every tenant."""
        return self.post(f"/v1/tasks/task{task}/classify?top_k=1", self.pictures[picture % len(self.pictures)], tenant)

    def post(self, path: str, body: bytes, tenant: str = TENANTS[0], kind: str = "application/octet-stream") -> bytes:
        key = f"Bearer {self.hub.keys[tenant]}"
        return request("POST", path, body, authorization=key, content_type=kind)

    def client(self, tenant: str = TENANTS[0]) -> Client:
        return Client(self.hub.url, self.hub.keys[tenant])


def main() -> None:
    """Measure, print tables, write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--backbone", default="demo", help="of all parts but saturation: demo, or a timm name")
    parser.add_argument("--saturation-backbone", default="vit_base_patch16_224")
    parser.add_argument("--calls", type=int, default=200, help="of the part idle")
    parser.add_argument("--rounds", type=int, default=5, help="of the other parts")
    parser.add_argument("--seconds", type=float, default=5.0, help="of a turn in a round")
    parser.add_argument("--saturation-seconds", type=float, default=40.0, help="the same in the part saturation")
    parser.add_argument("--callers", type=int, default=16)
    parser.add_argument("--greedy-open", type=int, default=1000, help="most calls of the greedy tenant under way")
    parser.add_argument("--batch-size", type=int, default=16, help="in the part saturation; callers are twice as many")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()

    small: dict[str, Callable[[Stage], dict[str, Any]]] = {
        "idle": lambda stage: idle(stage, options.calls),
        "throughput": lambda stage: throughput(stage, options.callers, options.rounds, options.seconds),
        "first-answer": first_answer,
        "tenants": lambda stage: tenants(stage, options.callers, options.greedy_open, options.rounds, options.seconds),
    }
    large: dict[str, Callable[[Stage], dict[str, Any]]] = {
        "saturation": lambda stage: saturation(stage, options.batch_size, options.rounds, options.saturation_seconds)
    }
    chosen = {name: str(value) for name, value in vars(options).items() if name != "output"}
    result: dict[str, Any] = {"machine": machine(), "options": chosen}
    result |= run(options.backbone, {p: f for p, f in small.items() if p in options.parts})
    wanted = {p: f for p, f in large.items() if p in options.parts}
    result |= run(options.saturation_backbone, wanted, batch_size=str(options.batch_size))
    result["bars"] = bars(result)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    show(result)
    print(f"written to {options.output}")


def run(name: str, parts: dict[str, Callable[[Stage], dict[str, Any]]], **settings: str) -> dict[str, Any]:
    """Run these parts one after another on a hub of their own."""
    if not parts:
        return {}
    process = bare.Process()
    with tempfile.TemporaryDirectory() as folder:
        backbone = process.ask(bare.prepare, name, Path(folder))
        side = process.ask(bare.side, backbone)
        adapters = process.ask(bare.random_adapters, backbone, 8)
        with hub_beside_empty(side, backbone=backbone, **settings) as hub:
            stage = Stage(hub, process, backbone, adapters, bare.pictures(side, 16))
            for tenant in TENANTS:
                with stage.client(tenant) as client:
                    for i, adapter in enumerate(adapters):
                        client.register(f"task{i}", adapter)
            return {part: {"backbone": name} | measure(stage) for part, measure in parts.items()}


def idle(stage: Stage, calls: int) -> dict[str, Any]:
    """Measure a call, the calls that it is compared with, and its parts, in turn, in milliseconds."""
    taken: list[dict[str, float]] = []
    messages = {
        "call": stage.classify(),
        "empty": stage.post(EMPTY + "/", stage.pictures[0]),
        "healthz": request("GET", "/healthz"),
    }
    connection = Connection(stage.hub.address)
    with stage.client() as client:
        for _ in track(range(WARM_UP + calls), "idle"):
            replies = {}
            for name, message in messages.items():
                replies[name] = ok(connection.call(message))
                if name == "call":
                    bare_ms = stage.bare.ask(bare.forward_ms, stage.backbone)
            decode_ms = stage.bare.ask(bare.decode_ms, stage.backbone, stage.pictures[0])
            began = time.perf_counter()
            client.classify("task0", [stage.pictures[0]], top_k=1)
            client_ms = 1e3 * (time.perf_counter() - began)
            timing = dict(item.split(";dur=") for item in replies["call"].header("server-timing").split(", "))
            row = {name: reply.ms for name, reply in replies.items()}
            row |= {name: float(ms) for name, ms in timing.items()}
            row |= {"bare": bare_ms, "decode": decode_ms, "client": client_ms}
            row["added"] = row["call"] - row["bare"]
            row["over_empty"] = row["call"] - row["empty"]
            row["rest"] = row["over_empty"] - decode_ms - sum(float(ms) for ms in timing.values())
            taken.append(row)
    connection.close()
    return {"calls": calls} | {f"{name}_ms": spread([row[name] for row in taken[WARM_UP:]]) for name in taken[0]}


def throughput(stage: Stage, callers: int, rounds: int, seconds: float) -> dict[str, Any]:
    """Measure requests per second of the hub and of the empty application, in turn."""
    contenders = {
        "hub": [stage.classify(picture=i) for i in range(len(stage.pictures))],
        "empty": [stage.post(EMPTY + "/", picture) for picture in stage.pictures],
    }
    rates: list[dict[str, float]] = []
    cpu_ms: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    gateway: list[float] = []  # of the hub / of the empty application plus decoding, by CPU time of a call
    for messages in contenders.values():
        closed_loop(stage.hub.address, messages, callers, TUNE_S)
    for _ in track(range(rounds), "throughput"):
        rates.append({})
        for name, messages in contenders.items():
            began = cpu_s()
            replies = closed_loop(stage.hub.address, messages, callers, seconds)
            took = cpu_s()
            cpu_ms[name].append({kind: 1e3 * (s - began[kind]) / len(replies) for kind, s in took.items()})
            rates[-1][name] = rate(replies, callers)
        rates[-1]["bare"] = stage.bare.ask(bare.images_per_second, stage.backbone, callers, seconds / 2)
        rates[-1]["work"] = stage.bare.ask(
            bare.work_per_second, stage.backbone, stage.adapters[:1], stage.pictures, callers, seconds / 2
        )
        decode_ms = median(stage.bare.ask(bare.decode_ms, stage.backbone, picture) for picture in stage.pictures)
        gateway.append(cpu_ms["hub"][-1]["gateway"] / (cpu_ms["empty"][-1]["gateway"] + decode_ms))
    return {
        "callers": callers,
        "per_second": {name: spread_of([r[name] for r in rates]) for name in rates[0]},
        "ratio": spread_of([r["hub"] / r["empty"] for r in rates]),
        "gateway_ratio": spread_of(gateway),
        "ceiling": {x: spread_of([r[x] / (r[x] + r["empty"]) for r in rates]) for x in ("bare", "work")},
        "to_ceiling": {x: spread_of([r["hub"] * (1 / r[x] + 1 / r["empty"]) for r in rates]) for x in ("bare", "work")},
        "cpu_ms": {
            name: {kind: round(median(one[kind] for one in turns), 3) for kind in turns[0]}
            for name, turns in cpu_ms.items()
        },
    }


def cpu_s() -> dict[str, float]:
    """Return the CPU time so far of hub and empty application by role, and of this process, the `caller`."""
    return cores.cpu_s(ROLES) | {"caller": time.process_time()}


def first_answer(stage: Stage) -> dict[str, Any]:
    """Measure milliseconds from the return of `register` to the first correct answer, for adapters new to every worker.

    The adapters are known numbers under new digests, so the correct answer is known.

    Raises:
        RuntimeError: an answer is not the new adapter's.
    """
    adapter = Adapter.read(stage.adapters[0])
    taken_ms = []
    with stage.client() as client:
        expected = client.classify("task0", [stage.pictures[0]], top_k=1).predictions[0][0].label
        for i in track(range(NEW_ADAPTERS), "first answer"):
            fresh = copy_of(adapter, i)
            client.register(f"new-{i}", fresh.data)
            began = time.perf_counter()
            answer = client.classify(f"new-{i}", [stage.pictures[0]], top_k=1)
            taken_ms.append(1e3 * (time.perf_counter() - began))
            if (answer.digest, answer.predictions[0][0].label) != (fresh.digest, expected):
                raise RuntimeError(f"wrong answer of new-{i}: {answer}")
    return {"first_answer_ms": spread(taken_ms), "adapter_bytes": len(adapter.data)}


def tenants(stage: Stage, callers: int, most_open: int, rounds: int, seconds: float) -> dict[str, Any]:
    """Measure the second tenant's p95 alone and beside a greedy tenant, in turn, for small and large greedy calls.

    The p95 of calls to the empty application, beside the same bytes at the same rate, is a floor for every hub.
    """
    out: dict[str, Any] = {}
    for images in GREEDY_IMAGES:
        files = [("image", (f"{i}", stage.pictures[i % len(stage.pictures)])) for i in range(images)]
        form = httpx.Request("POST", "http://hub", files=files)
        path, body, kind = "/v1/tasks/task0/classify?top_k=1", form.read(), form.headers["content-type"]
        greedy = stage.classify() if images == 1 else stage.post(path, body, kind=kind)
        sides = {
            "hub": (stage.classify(1, tenant=TENANTS[1]), greedy),
            "empty": (stage.post(EMPTY + "/", stage.pictures[0], TENANTS[1]), stage.post(EMPTY + "/", body, kind=kind)),
        }
        time.sleep(5 * SETTLE_S)  # the load before must be over
        takes = rate(closed_loop(stage.hub.address, [greedy], callers, seconds), callers)
        turns: list[dict[str, float]] = []
        modest_statuses: Counter[int] = Counter()
        greedy_statuses: Counter[str] = Counter()
        for _ in track(range(rounds), f"tenants, {images} images a call"):
            turns.append({})
            for side, (modest, crowd) in sides.items():
                time.sleep(5 * SETTLE_S)  # the hub drops the last load's calls, which takes some time
                alone = closed_loop(stage.hub.address, [modest], 1, seconds)
                lasts = seconds + 2 * SETTLE_S
                stage.bare.send(open_loop, stage.hub.address, crowd, GREED * takes, lasts, most_open)
                time.sleep(SETTLE_S)
                beside = closed_loop(stage.hub.address, [modest], 1, seconds)
                statuses = stage.bare.receive()
                if side == "hub":
                    greedy_statuses.update(statuses)
                    modest_statuses.update(reply.status for reply in beside)
                turns[-1] |= {f"{side} alone": p95(alone), f"{side} beside": p95(beside)}
        out[f"{images} images"] = {
            "hub_takes_calls_per_second": round(takes, 1),
            "offered_calls_per_second": round(GREED * takes, 1),
            "p95_ms": {name: spread_of([turn[name] for turn in turns]) for name in turns[0]},
            "ratio": spread_of([turn["hub beside"] / turn["hub alone"] for turn in turns]),
            "empty_ratio": spread_of([turn["empty beside"] / turn["empty alone"] for turn in turns]),
            "modest_statuses": {str(status): n for status, n in modest_statuses.items()},
            "greedy_statuses": dict(greedy_statuses),
        }
    return out


def saturation(stage: Stage, batch_size: int, rounds: int, seconds: float) -> dict[str, Any]:
    """Measure images per second of the bare backbone and of the hub, in turn."""
    callers = 2 * batch_size
    turns: list[dict[str, float]] = []
    batches: list[int] = []
    quickest = stage.bare.ask(bare.quickest_batch, stage.backbone, batch_size, seconds)
    closed_loop(stage.hub.address, [stage.classify(i) for i in range(len(stage.adapters))], callers, SETTLE_S)
    for i in track(range(rounds), "saturation"):
        turns.append({"bare": stage.bare.ask(bare.images_per_second, stage.backbone, quickest, seconds)})
        turns[-1]["work"] = stage.bare.ask(
            bare.work_per_second, stage.backbone, stage.adapters, stage.pictures, quickest, seconds
        )
        # The order alternates, because the hub is idle before the first one.
        for adapters in (1, len(stage.adapters))[:: -1 if i % 2 else 1]:
            messages = [stage.classify(n % adapters, n) for n in range(8 * len(stage.pictures))]
            replies = closed_loop(stage.hub.address, messages, callers, seconds)
            turns[-1][f"{adapters} adapters"] = rate_of_passes(replies[:-callers])
            batches += [int(reply.header("x-batch-images")) for reply in replies[callers:-callers]]
    names = list(turns[0])
    return {
        "batch_size": batch_size,
        "median_batch": median(batches),
        "bare_batch": quickest,
        "bare": {"images_per_second": spread_of([turn["bare"] for turn in turns])},
    } | {
        name: {
            "images_per_second": spread_of([turn[name] for turn in turns]),
            "to_bare": spread_of([turn[name] / turn["bare"] for turn in turns]),
            "to_work": spread_of([turn[name] / turn["work"] for turn in turns]),
        }
        for name in names[1:]
    }


def spread_of(values: list[float]) -> dict[str, float]:
    """Return `spread`, also for one round."""
    return spread(values if len(values) > 1 else 2 * values)


def bars(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the targets of the parts that ran."""
    out = {}
    for name, (path, bar, at_most) in BARS.items():
        value: Any = result
        for key in path:
            value = value.get(key, {})
        if value != {}:
            out[name] = {"value": value, "bar": bar, "holds": value <= bar if at_most else value >= bar}
    return out


def show(result: dict[str, Any]) -> None:
    """Print the parts of an idle call, every other figure with its quartiles, and the targets."""
    console = Console()
    if "idle" in result:
        ms = {name: found["median"] for name, found in result["idle"].items() if name.endswith("_ms")}
        out = Table("an idle call", "ms (median)", box=box.SIMPLE_HEAD)
        for what, value in (
            ("the whole call", ms["call_ms"]),
            ("proxy and gateway (GET /healthz)", ms["healthz_ms"]),
            ("handle and worker (the empty application, less that)", ms["empty_ms"] - ms["healthz_ms"]),
            ("decoding the image (the same code, alone)", ms["decode_ms"]),
            ("load", ms["load_ms"]),
            ("queue", ms["queue_ms"]),
            ("compute", ms["compute_ms"]),
            ("  of that a bare forward pass", ms["bare_ms"]),
            ("the rest: key, task, routing, answer", ms["rest_ms"]),
            ("hub.Client instead of a plain socket", ms["client_ms"] - ms["call_ms"]),
        ):
            out.add_row(what, f"{value:.2f}")
        console.print(out)
    out = Table("", "median", "quartiles", box=box.SIMPLE_HEAD)
    for part in PARTS:
        for name, found in spreads(result.get(part, {})):
            out.add_row(f"{part}: {name}", f"{found['median']:.2f}", f"{found['q1']:.2f} to {found['q3']:.2f}")
    console.print(out)
    for name, bar in result["bars"].items():
        console.print(f"{name}: {bar['value']:.2f}, bar {bar['bar']}: {'holds' if bar['holds'] else 'does not hold'}")


def spreads(found: Any, name: str = "") -> list[tuple[str, dict[str, float]]]:
    """Yield every median with quartiles, and its path."""
    if not isinstance(found, dict):
        return []
    if "median" in found:
        return [(name, found)]
    return [row for key, value in found.items() for row in spreads(value, f"{name} {key}".strip())]


if __name__ == "__main__":
    main()
