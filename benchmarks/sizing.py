"""Memory, disk and processor time of a whole hub with 1, 100 and 10,000 tasks; docs/operate.md shows the table.

    python -m benchmarks.sizing [--backbones demo vit_small vit_base] [--output FILE]

Each backbone gets one `karst-hub serve` with one gateway and one worker, and a Redis and a store of its own. Tasks are
written straight into registry and store. Up to `MAX_FILES` tasks have a file of their own; further ones are entries of
the registry only, and their share of the store is their number times the size of a file. At each step every task with a
file is called once, then the hub rests. The backbones but `demo` have random weights: sizes do not depend on them.

Memory is the proportional set size of all processes under `karst-hub serve`, in which a page that several share counts
once, and the resident size of the worker and of the gateway. Memory figures do not depend on other load. Processor time
is given as a share of one core at rest, and as milliseconds of all processes a call.
"""

import argparse
import asyncio
import json
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import redis
import timm
import torch
from rich.console import Console
from timm.models import save_for_hf

from adapters import Adapter, Backbone, Bank, KarstConfig, load_backbone
from hub.admin_schemas import LimitsChange
from hub.client.client import Client
from hub.local.embedded_redis import embedded_redis
from hub.local.ports import free_port
from hub.registry.audit import OPERATOR
from hub.registry.redis.connection import RegistryConnection
from hub.registry.tasks import TaskRegistry
from hub.registry.tenants import TenantRegistry
from hub.schemas import LATEST, VersionInfo
from hub.settings import Settings
from hub.storage.store import Store
from tests.support.hub_process import Served, command, descendants, serve
from tests.support.models import png

from .capacity_registry import run
from .common import copy_of, machine, markdown_table, random_adapter
from .cores import by_process, used_s

OUTPUT = Path(__file__).parent / "results" / "sizing.json"
ARCHITECTURES = {"demo": None, "vit_small": "vit_small_patch16_224", "vit_base": "vit_base_patch16_224"}
STEPS = (1, 100, 10_000)
MAX_FILES = 1_000
CONFIG = KarstConfig(kernels=2, rank=8)
CLASSES = 10
TENANT = "default"
NO_LIMITS = LimitsChange(
    requests_per_second=1e6, images_per_second=1e7, images_in_flight=10**6, tasks=10**6, stored_bytes=10**14
)
AT_ONCE, CALLERS = 32, 4
REST_S = 20.0
SETTLE_S = 6.0  # workers report their state every two seconds
WARM_CALLS = 40
MIB = 1024**2


def main() -> None:
    """Measure, print a table, write the JSON file after each backbone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbones", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    found: dict[str, Any] = json.loads(options.output.read_text()) if options.output.exists() else {}
    for name in options.backbones:
        with tempfile.TemporaryDirectory() as folder:
            found[name] = {"machine": machine()} | measure(name, Path(folder))
        options.output.write_text(json.dumps(found, indent=1) + "\n")
        Console().print(table(found), markup=False)


def measure(name: str, folder: Path) -> dict[str, Any]:
    """Measure one backbone, with tasks added from step to step."""
    architecture = ARCHITECTURES[name]
    backbone_name = name if architecture is None else local_backbone(folder / "weights", architecture)
    backbone = load_backbone(backbone_name)
    adapter = random_adapter(backbone, CONFIG, classes=CLASSES)
    settings = Settings(backbone=backbone_name)
    out: dict[str, Any] = {
        "backbone": architecture or name,
        "parameters": sum(p.numel() for p in backbone.model.parameters()),
        "adapter_file_bytes": len(adapter.data),
        "slots": settings.slots,
        "bank_bytes": bank_bytes(backbone, settings),
        "host_limit_bytes": settings.host_cache_bytes,
        "steps": {},
    }
    (folder / "redis").mkdir()
    with embedded_redis(folder / "redis") as url:
        store = folder / "store"
        served = serve(
            *(folder / "home", free_port()),
            HUB_BACKBONE=backbone_name,
            HUB_REDIS_URL=url,
            HUB_STORE_URL=str(store),
        )
        try:
            run(url, lambda database: TenantRegistry(database).change_limits(OPERATOR, TENANT, NO_LIMITS))
            out["empty"] = processes(served)
            tasks = Tasks(url, Store(str(store)), adapter)
            for count in STEPS:
                tasks.grow_to(count)
                out["steps"][str(count)] = step(served, url, tasks, store)
                print(name, count, out["steps"][str(count)], flush=True)
        finally:
            served.stop()
    return out


def local_backbone(folder: Path, architecture: str) -> str:
    """Write a model with seeded random weights, and return the name by which timm opens it."""
    torch.manual_seed(0)
    model: Any = timm.create_model(architecture, num_classes=0)
    save_for_hf(model, str(folder), safe_serialization=True)
    return f"local-dir:{folder}"


def bank_bytes(backbone: Backbone, settings: Settings) -> int:
    """Return the memory of all slots, without heads."""
    bank = Bank(backbone, 1, max_rank=settings.max_rank, max_kernels=settings.max_kernels)
    return settings.slots * int(bank._memory._rows[0].nbytes)


@dataclass
class Tasks:
    """Tasks in registry and store, written without the hub's HTTP."""

    url: str
    store: Store
    adapter: Adapter
    count: int = 0

    @property
    def with_files(self) -> int:
        """Number of tasks that have a file of their own."""
        return min(self.count, MAX_FILES)

    def grow_to(self, count: int) -> None:
        """Add tasks until there are `count`."""
        files = {i: copy_of(self.adapter, i) for i in range(self.count, min(count, MAX_FILES))}
        for file in files.values():
            self.store.put(file.digest, file.data)
        numbers = iter(range(self.count, count))

        async def register(database: RegistryConnection) -> None:
            registry = TaskRegistry(database)

            async def some() -> None:
                for i in numbers:
                    digest = files[i].digest if i in files else f"{i:064x}"
                    await registry.register(OPERATOR, TENANT, f"task-{i}", self._version(digest), [LATEST])

            await asyncio.gather(*(some() for _ in range(AT_ONCE)))

        run(self.url, register)
        self.count = count

    def _version(self, digest: str) -> VersionInfo:
        adapter = self.adapter
        return VersionInfo(
            version=0,
            digest=digest,
            labels=list(adapter.labels),
            backbone=adapter.backbone,
            fingerprint=adapter.fingerprint,
            config=adapter.config.model_dump(mode="json"),
            preprocess=adapter.preprocess,
            metrics=None,
            size_bytes=len(adapter.data),
            registered="2026-01-01T00:00:00+00:00",
        )


def step(served: Served, url: str, tasks: Tasks, store: Path) -> dict[str, Any]:
    """Call each task with a file once, call one of them often, let the hub rest; return all figures."""
    names = [f"task-{i}" for i in range(tasks.with_files)]
    call(served, names)
    began, busy = cpu_s(served), WARM_CALLS
    call(served, names[-1:] * busy)
    call_ms = {role: 1000 * used / busy for role, used in used_s(began, cpu_s(served)).items()}
    time.sleep(SETTLE_S)
    began, at = cpu_s(served), time.monotonic()
    time.sleep(REST_S)
    rest_s = time.monotonic() - at
    idle = {role: used / rest_s for role, used in used_s(began, cpu_s(served)).items()}
    with Client(served.url, served.admin_key or "") as admin:
        (worker,) = admin.status().workers
    server = redis.Redis.from_url(url)
    try:
        memory, dataset = (int(server.info("memory")[name]) for name in ("used_memory_rss", "used_memory"))
        log_bytes = int(server.info("persistence")["aof_current_size"])
    finally:
        server.close()
    return {
        "processes": processes(served),
        "redis_rss_bytes": memory,
        "redis_used_bytes": dataset,
        "redis_log_bytes": log_bytes,
        "store_bytes": tasks.count * len(tasks.adapter.data),
        "store_bytes_on_disk": sum(file.stat().st_size for file in store.rglob("*") if file.is_file()),
        "files": tasks.with_files,
        "slots_used": worker.slots_used,
        "host_bytes": worker.host_bytes,
        "idle_cores": round(sum(idle.values()), 3),
        "idle_cores_by_role": {role: round(share, 3) for role, share in idle.items()},
        "warm_call_cpu_ms": round(sum(call_ms.values()), 2),
        "warm_call_cpu_ms_by_role": {role: round(ms, 2) for role, ms in call_ms.items()},
    }


def call(served: Served, names: Sequence[str]) -> None:
    """Classify one image with each of these tasks."""
    image = png(0)
    with Client(served.url, served.key or "", retry_s=30) as client, ThreadPoolExecutor(CALLERS) as pool:
        list(pool.map(lambda name: client.classify(name, [image], top_k=1), names))


def role_of(pid: int, served: Served) -> str:
    """Return the part of the hub that a process is."""
    text = command(pid)
    if pid == served.process.pid:
        return "serve"
    for deployment in ("worker", "gateway"):
        if f"ServeReplica:karst-hub:{deployment}" in text:
            return deployment
    return "haproxy" if "haproxy" in text else "ray"


def group(served: Served) -> list[int]:
    return [served.process.pid, *descendants(served.process.pid)]


def processes(served: Served) -> dict[str, Any]:
    """Return the memory of the hub's processes, in bytes, by part."""
    out: dict[str, Any] = {}
    for pid in group(served):
        try:
            info = psutil.Process(pid).memory_full_info()
        except psutil.Error:  # it has just ended
            continue
        part = out.setdefault(role_of(pid, served), {"processes": 0, "pss_bytes": 0, "rss_bytes": 0})
        part["processes"] += 1
        part["pss_bytes"] += info.pss
        part["rss_bytes"] += info.rss
    out["pss_bytes"] = sum(part["pss_bytes"] for part in out.values())
    return out


def cpu_s(served: Served) -> dict[int, tuple[str, float]]:
    """Return part and processor time so far of each living process of the hub, by its id."""
    top = psutil.Process(served.process.pid)
    return by_process([top, *top.children(recursive=True)], lambda process: role_of(process.pid, served))


def table(found: dict[str, Any]) -> str:
    """Return the table of docs/operate.md."""
    rows = []
    for name in (name for name in ARCHITECTURES if name in found):
        result = found[name]
        for count, step in result["steps"].items():
            memory = step["processes"]
            rows.append(
                [
                    f"{name}" if name == "demo" else result["backbone"],
                    f"{int(count):,}",
                    *(f"{memory[part]['rss_bytes'] / MIB:,.0f}" for part in ("worker", "gateway")),
                    f"{memory['pss_bytes'] / MIB:,.0f}",
                    f"{step['host_bytes'] / MIB:,.0f}",
                    f"{step['redis_rss_bytes'] / MIB:,.0f}",
                    f"{step['store_bytes'] / MIB:,.0f}",
                    f"{step['redis_log_bytes'] / MIB:,.1f}",
                    f"{step['idle_cores']:.2f}",
                ]
            )
    heading = ["backbone", "tasks", "worker", "gateway", "all processes", "of it adapters in host memory", "Redis"]
    return markdown_table([*heading, "adapter files", "Redis' log", "cores at rest"], rows)


if __name__ == "__main__":
    main()
