"""CPU time with which gateways and workers feed a fast device: images per second for each core of either.

    python -m benchmarks.feed [--backbones demo vit_tiny_patch16_224] [--rounds 5] [--before FOLDER] [--output FILE]

A whole hub runs: HAProxy, one gateway, and one worker replica whose bank has a stand-in for the device. Its pass
sleeps as long as the device would compute (`--device-rate` images per second, `--pass-ms` at least), uses no CPU, and
gives zeros. The heads, typicality and all other code of the worker are the hub's. The size of the images is the
backbone's: 32 pixels for the demo (PNG), 224 for a timm model with random weights (JPEG).

Calls of one image and of 16 take turns in these forms within a round:

* together: as the hub does it;
* alone: in the same processes, but each call is a send of its own through Serve's handle;
* before: in a hub of an older commit, beside this one, if `--before` names a checkout of it. The benchmark and all
  libraries are this commit's. `ff5ff17` is the last commit before calls of a gateway left together.

One more turn calls an empty gateway, which reads the body and answers. With the time to decode an image in a thread,
measured in a process of its own, this is about the least that a gateway behind Ray Serve can take. The limit of the
ratio is that of a hub whose gateway takes no more, and whose worker takes nothing.

A figure is images over the CPU time of the role's processes, so other programs on the machine change it little. The
load comes from plain sockets (`benchmarks.load`). From the figures follow the cores that a device needs.
"""

import argparse
import hashlib
import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import httpx
from rich.progress import track

from hub.client.client import Client

from . import bare, cores
from .beside import TENANTS, Hub, hub_process
from .common import machine, markdown_table, spread
from .feed_hub import FLOOR
from .load import closed_loop, ok, request

OUTPUT = Path(__file__).parent / "results" / "feed.json"
BACKBONES = ("demo", "vit_tiny_patch16_224")
IMAGES = (1, 16)  # of a call
FORMS = ("before", "alone", "together")  # also the tasks' names
ROLES = {
    "karst-hub:worker": "worker",
    "karst-hub:gateway": "gateway",
    "floor:gateway": "floor",
    "haproxy": "haproxy",
    "redis": "redis",
}
WARM_UP_S = 2.0
DECODES = 20  # measured after each turn of the empty gateway


def main() -> None:
    """Measure, print tables, write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--backbones", nargs="+", default=BACKBONES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="of a turn in a round")
    parser.add_argument(
        "--callers", type=int, default=64, help="connections; calls of 16 images have a quarter of them"
    )
    parser.add_argument("--device-rate", type=float, default=4000.0, help="images per second of the stand-in")
    parser.add_argument("--pass-ms", type=float, default=5.0, help="shortest pass of the stand-in")
    parser.add_argument("--before", type=Path, help="checkout of an older commit, whose hub takes turns with this one")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    if options.before is not None and not (options.before / "hub").is_dir():
        parser.error(f"{options.before} is no checkout of this repository: it has no folder hub")
    chosen = {name: value for name, value in vars(options).items() if name not in ("output", "before")}
    result: dict[str, Any] = {"machine": machine(), "options": chosen}
    if options.before is not None:
        result["before"] = commit_of(options.before)
    result["rows"] = [row for name in options.backbones for row in measure(name, options)]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    print(table(result["rows"]), needs(result), sep="\n\n")
    print(f"written to {options.output}")


def commit_of(folder: Path) -> str:
    """Return the commit of a checkout."""
    command = ["git", "-C", str(folder), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def measure(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return one row for each number of images in a call."""
    process = bare.Process()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as running:
        backbone = process.ask(bare.prepare, name, Path(folder))
        side = process.ask(bare.side, backbone)
        adapters = dict(zip(FORMS, process.ask(bare.random_adapters, backbone, len(FORMS)), strict=True))
        pictures = bare.pictures(side, 16)
        alone = hashlib.sha256(adapters["alone"]).hexdigest()
        command = ["-m", "benchmarks.feed_hub", str(options.device_rate), str(options.pass_ms), alone]
        now = running.enter_context(hub_process(command, backbone=backbone))
        hubs = {"alone": now, "together": now, "floor": now}
        if options.before is not None:
            older = hub_process(command, before=options.before, backbone=backbone)
            hubs = {"before": running.enter_context(older)} | hubs
        for form, hub in hubs.items():
            if form in FORMS:
                with Client(hub.url, hub.keys[TENANTS[0]]) as client:
                    client.register(form, adapters[form])
        return [
            {"backbone": name, "side_px": side, "images": images}
            | turns(hubs, pictures, images, options, lambda: process.ask(bare.decode_ms, backbone, pictures[0]))
            for images in IMAGES
        ]


def turns(
    hubs: dict[str, Hub],
    pictures: Sequence[bytes],
    images: int,
    options: argparse.Namespace,
    decode_ms: Callable[[], float],
) -> dict[str, Any]:
    """Measure all forms and the empty gateway in turn. Each call has `images` images.

    Args:
        hubs: of each form, and of the empty gateway, `floor`.
    """
    callers = max(1, options.callers if images == 1 else options.callers // 4)
    load = {
        form: message(hub, f"/v1/tasks/{form}/classify?top_k=1" if form in FORMS else f"{FLOOR}/", pictures, images)
        for form, hub in hubs.items()
    }
    for form, sent in load.items():
        closed_loop(hubs[form].address, [sent], callers, WARM_UP_S)
    rounds: list[dict[str, dict[str, float]]] = []
    for i in track(range(options.rounds), f"calls of {images}"):
        rounds.append({})
        for form in [*load][:: -1 if i % 2 else 1]:
            hub = hubs[form]
            began, started_s = cores.cpu_s(ROLES, hub.pid), time.perf_counter()
            replies = closed_loop(hub.address, [load[form]], callers, options.seconds)
            took_s, took = time.perf_counter() - started_s, cores.cpu_s(ROLES, hub.pid)
            done = images * len([ok(reply) for reply in replies])
            cpu_s = {role: took[role] - began[role] for role in took}
            if form == "floor":
                least_s = cpu_s["floor"] / done + 1e-3 * median([decode_ms() for _ in range(DECODES)])
                rounds[-1][form] = {"images_per_s": done / took_s, "core": 1 / least_s}
                continue
            batch = sum(int(reply.header("x-batch-images")) for reply in replies) / len(replies)
            rounds[-1][form] = {
                "images_per_s": done / took_s,
                "batch": batch,
                **{f"{role}_ms": 1e3 * s / done for role, s in cpu_s.items()},
                "gateway_core": done / cpu_s["gateway"],
                "worker_core": done / cpu_s["worker"],
                "core": done / (cpu_s["gateway"] + cpu_s["worker"]),
            }
    rounds *= 2 if len(rounds) == 1 else 1  # quartiles need two

    def ratios(form: str, key: str, other: str, other_key: str) -> dict[str, float]:
        return spread([one[form][key] / one[other][other_key] for one in rounds])

    keys, of_gateways = ("gateway_core", "worker_core", "core"), ("gateway_core", "core")
    others = [form for form in FORMS if form in hubs and form != "together"]
    return {
        "callers": callers,
        **{form: {key: spread([one[form][key] for one in rounds]) for key in rounds[0][form]} for form in load},
        "ratio": {form: {key: ratios("together", key, form, key) for key in keys} for form in others},
        # Of a hub whose gateway takes as much as the empty one plus decoding, and whose worker takes nothing.
        "limit": {form: {key: ratios("floor", "core", form, key) for key in of_gateways} for form in others},
    }


def message(hub: Hub, path: str, pictures: Sequence[bytes], images: int) -> bytes:
    """Return the bytes of a call with `images` images."""
    key = f"Bearer {hub.keys[TENANTS[0]]}"
    if images == 1:
        return request("POST", path, pictures[0], authorization=key, content_type="application/octet-stream")
    files = [("image", (f"{i}", pictures[i % len(pictures)])) for i in range(images)]
    form = httpx.Request("POST", "http://hub", files=files)
    return request("POST", path, form.read(), authorization=key, content_type=form.headers["content-type"])


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the figures as a table of Markdown."""

    def value(found: dict[str, float], digits: int = 0) -> str:
        return f"{found['median']:,.{digits}f} ({found['q1']:,.{digits}f}-{found['q3']:,.{digits}f})"

    lines = []
    for row in rows:
        call = f"{row['side_px']} px, {row['images']} per call"
        for form in (form for form in FORMS if form in row):
            found = row[form]
            lines.append(
                [
                    f"{call}, {form}",
                    *(value(found[key]) for key in ("gateway_core", "worker_core", "core")),
                    f"{found['haproxy_ms']['median']:.2f}",
                    f"{found['batch']['median']:.0f}",
                ]
            )
        floor = value(row["floor"]["core"])
        lines.append([f"{call}, empty gateway and decoding", floor, "", floor, "", ""])
        for form, ratio in row["ratio"].items():
            figures = (value(ratio[key], 2) for key in ("gateway_core", "worker_core", "core"))
            lines.append([f"{call}, together / {form}", *figures, "", ""])
            limit = row["limit"][form]
            lines.append(
                [
                    f"{call}, limit of together / {form}",
                    value(limit["gateway_core"], 2),
                    "",
                    value(limit["core"], 2),
                    "",
                    "",
                ]
            )
    names = ["gateway", "worker", "both"]
    return markdown_table(
        ["calls", *(f"images/s per core, {name}" for name in names), "HAProxy, ms an image", "images per pass"], lines
    )


def needs(result: dict[str, Any]) -> str:
    """Return the cores that one device of `--device-rate` needs, as a table of Markdown."""
    rate = result["options"]["device_rate"]
    lines = []
    for row in result["rows"]:
        found = row["together"]
        gateways, workers = (rate / found[f"{role}_core"]["median"] for role in ("gateway", "worker"))
        haproxy = rate * found["haproxy_ms"]["median"] / 1e3
        lines.append(
            [f"{row['side_px']} px, {row['images']} per call", *(f"{n:.1f}" for n in (gateways, workers, haproxy))]
        )
    return markdown_table([f"cores for {rate:,.0f} images/s", "gateways", "workers", "HAProxy"], lines)


if __name__ == "__main__":
    main()
