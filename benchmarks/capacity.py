"""Constants of the capacity model (docs/scaling.md), measured on this machine.

    python -m benchmarks.capacity [--parts registry events ...] [--output FILE]

`registry`  operations per second against a real redis-server, and Redis's CPU time of each; 1 / that is the maximum
`events`    a change that 1, 10 and 100 gateways follow: Redis's CPU time, and milliseconds until the last receives it
`memory`    bytes of Redis and of a gateway's cache per task, with 10 to 100,000 tasks
`adapters`  bytes of an adapter as a file, in host memory and in a slot; CPU time of each step between them
`gateway`   CPU time of a gateway per call and per image, over an engine that answers at once, with and without HTTP
`routing`   CPU time of the choice of a worker among 2 to 1,000, and of informing a gateway of all workers' adapters
`passes`    CPU time of a forward pass against the number of its images, with one thread
`zipf`      hit rates of slots under Zipf traffic, and Che's approximation of them

The figures are CPU time, not wall time, wherever other processes share the cores. The file keeps the figures of parts
that do not run.
"""

import argparse
import asyncio
import hashlib
import json
import multiprocessing
import pickle
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import httpx
import numpy as np
import psutil
import torch
from rich.console import Console

from adapters import Adapter, Backbone, Bank, BankLimits, KarstConfig, load_backbone
from hub.client.client import Client
from hub.registry.audit import OPERATOR
from hub.registry.keys import OWNER, KeyRegistry
from hub.settings import Settings

from . import bare
from .capacity_registry import TENANT, events, memory, registry, run, server
from .cluster_model import che_hit_rate, lru_hit_rate, zipf
from .common import copy_of, machine, markdown_table, random_adapter
from .load import closed_loop, request

OUTPUT = Path(__file__).parent / "results" / "capacity.json"
BATCHES = (1, 2, 4, 8, 16, 32)
CALLERS, SECONDS = 4, 5.0
SMALL, LARGE = KarstConfig(kernels=2, rank=8), KarstConfig(kernels=8, rank=16)


def main() -> None:
    """Measure, print a table, write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    result = json.loads(options.output.read_text()) if options.output.exists() else {}
    for part in options.parts:
        began = time.perf_counter()
        found = PARTS[part]()
        result[part] = {"machine": machine(), "took_s": round(time.perf_counter() - began, 1)} | found
        Console().print(markdown_table(["what", "value"], rows(part, found)), markup=False)
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {options.output}")


def rows(name: str, found: Any) -> list[list[str]]:
    """Yield every figure with its path."""
    if isinstance(found, dict):
        return [row for key, value in found.items() for row in rows(f"{name} {key}", value)]
    return [[name, f"{found:,.4g}" if isinstance(found, float) else str(found)]]


def adapters() -> dict[str, Any]:
    """Measure an adapter's bytes and its way into a slot; files are float16, banks on a CPU float32."""
    torch.set_num_threads(1)  # the number of the worker's reader threads
    out: dict[str, Any] = {}
    for name in ("demo", "vit_base_patch16_224"):
        backbone = load_backbone(name, pretrained=False)
        banks = {"small": Bank(backbone, 4, max_rank=8, max_kernels=2), "default limits": Bank(backbone, 4, 16, 8)}
        out[name] = {f"slot_bytes, {kind}": bank._memory._rows[0].nbytes for kind, bank in banks.items()}
        for config in (SMALL, LARGE):
            adapter = copy_of(random_adapter(backbone, config), 0, torch.float16)
            bank = banks["default limits"]
            began = time.thread_time()
            kept = [bank.pack(Adapter.read(adapter.data)) for _ in range(20)]
            read_ms = 1e3 * (time.thread_time() - began) / len(kept)
            began = time.thread_time()
            for packed in kept:
                bank.evict(bank.put(packed))
            out[name][f"N={config.kernels} r={config.rank}"] = {
                "file_bytes": len(adapter.data),
                "host_bytes": kept[0].size_bytes,
                "read_and_pack_cpu_ms": read_ms,
                "put_cpu_ms": 1e3 * (time.thread_time() - began) / len(kept),
            }
    return out


def gateway() -> dict[str, Any]:
    """Measure a gateway's CPU time: its whole application runs under uvicorn over an engine that answers at once."""
    out: dict[str, Any] = {}
    for name in ("demo", "vit_tiny_patch16_224"):
        backbone = _backbone(name)
        pictures = bare.pictures(backbone.input_size[1], 16)
        forms = httpx.Request("POST", "http://hub", files=[("image", (str(i), p)) for i, p in enumerate(pictures)])
        with server() as one, tempfile.TemporaryDirectory() as store, listening(one.url, store, name) as (port, pid):
            key = run(one.url, lambda db: KeyRegistry(db).create(OPERATOR, TENANT, OWNER, "benchmark")).key
            with Client(f"http://127.0.0.1:{port}", key) as client:
                client.register("task", random_adapter(backbone, SMALL).data)
            head = {"authorization": f"Bearer {key}"}
            path = "/v1/tasks/task/classify?top_k=1"
            single = [request("POST", path, p, content_type="application/octet-stream", **head) for p in pictures]
            many = [request("POST", path, forms.read(), content_type=forms.headers["content-type"], **head)]
            found = {
                "image_bytes": round(statistics.mean(map(len, pictures))),
                "healthz_ms": _cpu_ms(port, pid, [request("GET", "/healthz")]),
                "call_of_1_image_ms": _cpu_ms(port, pid, single),
                "call_of_16_images_ms": _cpu_ms(port, pid, many),
            }
            found["an_image_more_ms"] = (found["call_of_16_images_ms"] - found["call_of_1_image_ms"]) / 15
            out[f"{backbone.input_size[1]} pixels"] = found
    return out


def _cpu_ms(port: int, pid: int, messages: list[bytes]) -> float:
    """Return a call's CPU time over all threads of the process."""
    process, address = psutil.Process(pid), ("127.0.0.1", port)
    closed_loop(address, messages, CALLERS, 0.5)
    before = sum(process.cpu_times()[:2])
    replies = closed_loop(address, messages, CALLERS, SECONDS)
    if wrong := [reply for reply in replies if reply.status != 200]:
        raise RuntimeError(f"{len(wrong)} calls failed: {wrong[0]}")
    return 1e3 * (sum(process.cpu_times()[:2]) - before) / len(replies)


@contextmanager
def listening(redis_url: str, store: str, backbone: str) -> Iterator[tuple[int, int]]:
    """Run a gateway in a process of its own; yield its port and process id."""
    listener = socket.create_server(("127.0.0.1", 0))
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=_serve, args=(listener, redis_url, store, backbone), daemon=True)
    process.start()
    port = listener.getsockname()[1]
    listener.close()
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                httpx.get(f"http://127.0.0.1:{port}/healthz", timeout=60).raise_for_status()
                break
            except httpx.TransportError:
                if time.monotonic() > deadline or not process.is_alive():
                    raise
                time.sleep(0.1)
        assert process.pid is not None
        yield port, process.pid
    finally:
        process.terminate()
        process.join()


def _backbone(name: str) -> Backbone:
    """Return the demo's weights, or random ones that are the same in every process."""
    torch.manual_seed(0)
    return load_backbone(name, pretrained=name == "demo")


def _serve(listener: socket.socket, redis_url: str, store: str, name: str) -> None:
    import uvicorn

    from hub.api.app import create_app
    from hub.worker_api import Answer, PassStats

    torch.set_num_threads(1)
    accepted = BankLimits(_backbone(name).info(), max_rank=16, max_kernels=8, factor=8)

    class Engine:
        async def limits(self) -> BankLimits:
            return accepted

        async def prefetch(self, digest: str) -> None:
            pass

        async def classify(
            self, tenant: str, digest: str, images: list[np.ndarray], weight: float, *, idle: bool = False
        ) -> list[Answer]:
            done = PassStats("engine", len(images), 1, 0.0, 0.0, 0.0)
            return [Answer(np.full(10, 0.1, np.float32), done) for _ in images]

    settings = Settings(backbone=name, redis_url=redis_url, store_url=store)
    config = uvicorn.Config(create_app(settings, Engine()), lifespan="on", log_level="warning", access_log=False)
    uvicorn.Server(config).run(sockets=[listener])


def passes() -> dict[str, Any]:
    """Measure the demo backbone's mixed passes, one adapter per image, and fit a line to them."""
    torch.set_num_threads(1)
    backbone = load_backbone("demo")
    bank = Bank(backbone, slots=max(BATCHES), max_rank=8, max_kernels=2)
    slots = [bank.put(copy_of(random_adapter(backbone, SMALL), i)) for i in range(max(BATCHES))]
    taken: dict[int, list[float]] = {size: [] for size in BATCHES}
    for _ in range(25):
        for size in BATCHES:
            pixels = torch.zeros(size, *backbone.input_size)
            began = time.thread_time()
            bank.forward(pixels, slots[:size])
            taken[size].append(1e3 * (time.thread_time() - began))
    ms = {size: statistics.median(values[5:]) for size, values in taken.items()}
    # The weight 1 / ms gives small and large passes the same relative error.
    slope, base = np.polyfit(list(ms), list(ms.values()), 1, w=[1 / value for value in ms.values()])
    by_size = {f"{size} images": value for size, value in ms.items()}
    return {"demo": {"cpu_ms": by_size, "pass_ms": float(base), "image_ms": float(slope)}}


def routing() -> dict[str, Any]:
    """Measure the CPU time of a gateway's choice of a worker, and of one update on all workers, as Serve sends it."""
    from ray.serve._private.common import (
        DeploymentHandleSource,
        DeploymentID,
        DeploymentTargetInfo,
        ReplicaID,
        RunningReplicaInfo,
    )
    from ray.serve.request_router import RequestRouter

    from hub.cluster.request_router import RendezvousRouter

    out: dict[str, Any] = {}
    names = [hashlib.sha256(str(i).encode()).hexdigest() for i in range(2_000)]
    for workers in (2, 32, 100, 1_000):
        infos = [
            RunningReplicaInfo(
                ReplicaID(f"{i:08x}", DeploymentID("worker", "karst-hub")),
                *(f"{i:056x}", "10.0.0.1", None, f"SERVE_REPLICA::karst-hub#worker#{i:08x}", 4096),
                routing_stats={"digests": [name[:16] for name in names[i : i + 64]]},
            )
            for i in range(workers)
        ]
        told = pickle.dumps(DeploymentTargetInfo(is_available=True, running_replicas=infos))
        router = RendezvousRouter(DeploymentID("worker", "karst-hub"), DeploymentHandleSource.REPLICA)
        router.initialize_state()
        with patch.object(RequestRouter, "update_replicas"):
            router.update_replicas(infos)  # type: ignore[arg-type]  # what it reads of them is the same
            replicas = list(infos)

            async def choose(router: Any = router, replicas: Any = replicas) -> float:
                calls = [Pending(SimpleNamespace(session_id=name)) for name in names]
                began = time.process_time()
                for pending in calls:
                    await router.choose_replicas(replicas, pending)
                return 1e6 * (time.process_time() - began) / len(calls)

            out[f"{workers} workers"] = {
                "choice_us": asyncio.run(choose()),
                "told_bytes": len(told),
                "tell_ms": 1e3 * _quickest(lambda infos=infos: pickle.dumps(infos)),
                "hear_ms": 1e3
                * _quickest(
                    lambda told=told, router=router: router.update_replicas(pickle.loads(told).running_replicas)
                ),
            }
    return out


@dataclass
class Pending:
    """The part of a pending call that the router reads."""

    metadata: SimpleNamespace
    routing_context: SimpleNamespace = field(default_factory=SimpleNamespace)


def _quickest(work: Callable[[], Any]) -> float:
    """Return the CPU seconds of the fastest of five calls."""
    taken = []
    for _ in range(5):
        began = time.process_time()
        work()
        taken.append(time.process_time() - began)
    return min(taken)


def zipf_hits() -> dict[str, Any]:
    """Return the hit rate of least-recently-used slots under Zipf(1.0): simulated, and by Che's approximation."""
    out: dict[str, Any] = {}
    rng = np.random.default_rng(0)
    for adapters in (10_000, 100_000, 1_000_000):
        weights = zipf(adapters, 1.0)
        stream = np.searchsorted(np.cumsum(weights), rng.random(600_000)).tolist()
        for slots in (64, 256, 1024, 16384):
            if slots * 4 <= adapters:
                counted, fitted = lru_hit_rate(stream, slots, skip=300_000), che_hit_rate(weights, slots)
                out[f"{adapters} adapters, {slots} slots"] = {"counted": counted, "che": fitted}
    return out


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "registry": registry,
    "events": events,
    "memory": memory,
    "adapters": adapters,
    "gateway": gateway,
    "passes": passes,
    "routing": routing,
    "zipf": zipf_hits,
}


if __name__ == "__main__":
    main()
