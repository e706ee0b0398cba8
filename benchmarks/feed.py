"""CPU time with which gateways and workers feed a fast device: images per second for each core of either.

    python -m benchmarks.feed [--backbones demo vit_tiny_patch16_224] [--rounds 5] [--output FILE]

A whole hub runs: HAProxy, one gateway, and one worker replica whose bank has a stand-in for the device. Its pass
sleeps as long as the device would compute (`--device-rate` images per second, `--pass-ms` at least), uses no CPU, and
gives zeros. The heads, typicality and all other code of the worker are the hub's. The size of the images is the
backbone's: 32 pixels for the demo (PNG), 224 for a timm model with random weights (JPEG).

Calls of one image and of 16 take turns in two forms within a round, in the same processes:

* alone: each call is a send of its own through Serve's handle, as before calls of a gateway left together;
* together: as the hub does it.

A third turn calls an empty gateway, which reads the body and answers. With the time to decode an image in a thread,
measured in a process of its own, this is about the least that a gateway behind Ray Serve can take. The limit of the
ratio is that of a hub whose gateway takes no more, and whose worker takes nothing.

A figure is images over the CPU time of the role's processes, so other programs on the machine change it little. The
load comes from plain sockets (`benchmarks.load`). From the figures follow the cores that a device needs.
"""

import argparse
import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Sequence
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
FORMS = ("alone", "together")  # also the tasks' names
ROLES = {
    "karst-hub:worker": "worker",
    "karst-hub:gateway": "gateway",
    "floor:gateway": "floor",
    "haproxy": "haproxy",
    "redis": "redis",
}
BAR = 2.5  # images per second for each core of gateway and worker, together / alone
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
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    result: dict[str, Any] = {
        "machine": machine(),
        "options": {name: value for name, value in vars(options).items() if name != "output"},
        "rows": [row for name in options.backbones for row in measure(name, options)],
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    print(table(result["rows"]), needs(result), sep="\n\n")
    print(f"written to {options.output}")


def measure(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return one row for each number of images in a call."""
    process = bare.Process()
    with tempfile.TemporaryDirectory() as folder:
        backbone = process.ask(bare.prepare, name, Path(folder))
        side = process.ask(bare.side, backbone)
        adapters = process.ask(bare.random_adapters, backbone, len(FORMS))
        pictures = bare.pictures(side, 16)
        alone = hashlib.sha256(adapters[0]).hexdigest()
        arguments = [str(options.device_rate), str(options.pass_ms), alone]
        with hub_process(["-m", "benchmarks.feed_hub", *arguments], backbone=backbone) as hub:
            with Client(hub.url, hub.keys[TENANTS[0]]) as client:
                for form, adapter in zip(FORMS, adapters, strict=True):
                    client.register(form, adapter)
            return [
                {"backbone": name, "side_px": side, "images": images}
                | turns(hub, pictures, images, options, lambda: process.ask(bare.decode_ms, backbone, pictures[0]))
                for images in IMAGES
            ]


def turns(
    hub: Hub, pictures: Sequence[bytes], images: int, options: argparse.Namespace, decode_ms: Callable[[], float]
) -> dict[str, Any]:
    """Measure both forms and the empty gateway in turn. Each call has `images` images."""
    callers = max(1, options.callers if images == 1 else options.callers // 4)
    rounds: list[dict[str, dict[str, float]]] = []
    load = {form: message(hub, f"/v1/tasks/{form}/classify?top_k=1", pictures, images) for form in FORMS}
    load["floor"] = message(hub, f"{FLOOR}/", pictures, images)
    for sent in load.values():
        closed_loop(hub.address, [sent], callers, WARM_UP_S)
    for i in track(range(options.rounds), f"calls of {images}"):
        rounds.append({})
        for form in [*load][:: -1 if i % 2 else 1]:
            began, started_s = cores.cpu_s(ROLES), time.perf_counter()
            replies = closed_loop(hub.address, [load[form]], callers, options.seconds)
            took_s, took = time.perf_counter() - started_s, cores.cpu_s(ROLES)
            done = images * len([ok(reply) for reply in replies])
            cpu_s = {role: took[role] - began[role] for role in took}
            if form == "floor":
                least_s = cpu_s["floor"] / done + 1e-3 * median([decode_ms() for _ in range(DECODES)])
                rounds[-1][form] = {"images_per_s": done / took_s, "gateway_core": 1 / least_s, "core": 1 / least_s}
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

    def ratios(form: str, keys: Sequence[str]) -> dict[str, Any]:
        return {key: spread([one[form][key] / one["alone"][key] for one in rounds]) for key in keys}

    return {
        "callers": callers,
        **{form: {key: spread([one[form][key] for one in rounds]) for key in rounds[0][form]} for form in load},
        "ratio": ratios("together", ("gateway_core", "worker_core", "core")),
        "limit": ratios("floor", ("gateway_core", "core")),
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
        for form in FORMS:
            found = row[form]
            lines.append(
                [
                    f"{row['side_px']} px, {row['images']} per call, {form}",
                    *(value(found[key]) for key in ("gateway_core", "worker_core", "core")),
                    f"{found['haproxy_ms']['median']:.2f}",
                    f"{found['batch']['median']:.0f}",
                ]
            )
        ratios = (value(row["ratio"][key], 2) for key in ("gateway_core", "worker_core", "core"))
        call = f"{row['side_px']} px, {row['images']} per call"
        lines.append([f"{call}, together / alone", *ratios, "", ""])
        floor, limit = value(row["floor"]["core"]), value(row["limit"]["core"], 2)
        lines.append([f"{call}, empty gateway and decoding", floor, "", floor, "", ""])
        lines.append(
            [f"{call}, its ratio to alone: the limit", value(row["limit"]["gateway_core"], 2), "", limit, "", ""]
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
