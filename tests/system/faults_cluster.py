"""A hub on several Ray nodes, each with processes of its own that can be killed together; all on this machine.

python -m tests.system.faults_cluster ADDRESS '<JSON of Settings>'    puts the application on a cluster, as
`serve deploy` would; again with other settings, it is an upgrade.
"""

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from adapters import Backbone
from hub.access import first_keys
from hub.client import Client
from hub.database import Database
from hub.embedded import embedded_redis
from hub.local import free_port, ray_environment
from hub.schemas import LimitsChange
from hub.settings import Settings
from hub.tenants import Tenants
from tests.system.faults import Load, RedisServer, Report, Tasks, replicas, wait_until
from tests.system.test_hub import alive, descendants

RAY = Path(sys.executable).parent / "ray"
LOOPBACK = "127.0.0.1"
TASKS = 6
PLENTY = LimitsChange(requests_per_second=10_000, images_per_second=10_000)


@dataclass
class Node:
    """`ray start --block` and everything below it."""

    process: subprocess.Popen[bytes]

    def replicas(self, deployment: str) -> list[int]:
        return replicas(self.process.pid, deployment)

    def kill(self) -> None:
        """kill -9 of every process at once."""
        group = [self.process.pid, *descendants(self.process.pid)]
        for pid in group:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait(30)
        wait_until(lambda: not any(map(alive, group)), 30, "the node's end")


@dataclass
class Cluster:
    """A head without CPUs for replicas, and nodes with two each. Every node has an HAProxy, all on one port: the kernel
    shares connections out among them, as a load balancer does in front of several machines. What Ray knows (its GCS) is
    in a Redis of its own, so that a head can come back."""

    settings: Settings
    environment: dict[str, str]
    folder: Path
    tasks: Tasks
    key: str
    port: int
    head: Node | None = None
    nodes: list[Node] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://{self.settings.host}:{self.settings.port}"

    def load(self, **options: object) -> Load:
        return Load(self.url, self.key, self.tasks, **options)  # type: ignore[arg-type]

    def start_head(self) -> None:
        self.head = self._start("--head", "--port", str(self.port), "--num-cpus", "0", "--include-dashboard", "false")

    def add_node(self) -> None:
        self.nodes.append(self._start("--address", f"{LOOPBACK}:{self.port}", "--num-cpus", "2"))

    def deploy(self, **changes: object) -> None:
        """Put the application there, or change it; returns when it runs."""
        self.settings = self.settings.model_copy(update=changes)
        command = [sys.executable, "-m", "tests.system.faults_cluster"]
        command += [f"{LOOPBACK}:{self.port}", self.settings.model_dump_json()]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-3000:]

    def workers(self) -> list[int]:
        return [pid for node in self.nodes for pid in node.replicas("worker")]

    def _start(self, *options: str) -> Node:
        command = [str(RAY), "start", "--block", "--disable-usage-stats", "--node-ip-address", LOOPBACK, *options]
        command += ["--object-store-memory", str(128 * 1024**2)]
        ports = {f"RAY_SERVE_HAPROXY_{name}_PORT": str(free_port()) for name in ("METRICS", "STATS")}
        with (self.folder / f"ray-{len(self.nodes)}.log").open("ab") as log:
            return Node(subprocess.Popen(command, env=self.environment | ports, stdout=log, stderr=log))


@contextmanager
def hub_on_a_cluster(folder: Path, backbone: Backbone, gateways: int = 2) -> Iterator[Cluster]:
    """A head and two nodes, two workers, its tasks registered and warm; kills all of it at the end."""
    run_folder = Path(tempfile.mkdtemp(prefix="karst-hub-"))  # short, as paths of sockets have to be
    (folder / "gcs").mkdir()
    gcs_port = free_port()
    gcs = RedisServer(folder / "gcs", gcs_port)
    with embedded_redis(folder) as redis_url:
        settings = Settings(
            backbone="demo", home=folder, redis_url=redis_url, store_url=str(folder / "store"), port=free_port(),
            min_workers=2, max_workers=2, min_gateways=gateways, max_gateways=gateways,
        )  # fmt: skip
        environment = os.environ | ray_environment(settings, run_folder)
        environment |= {"RAY_REDIS_ADDRESS": f"{LOOPBACK}:{gcs_port}", "RAY_external_storage_namespace": "karst"}
        keys = asyncio.run(_first_keys(redis_url))
        cluster = Cluster(settings, environment, folder, Tasks(backbone, TASKS), keys[0], free_port())
        try:
            gcs.start()
            wait_until(lambda: _listens(gcs_port), 30, "Ray's Redis")
            cluster.start_head()
            wait_until(lambda: _listens(cluster.port), 60, "the head")
            cluster.add_node()
            cluster.add_node()
            cluster.deploy()
            with Client(cluster.url, keys[1], retry_s=30) as admin:
                admin.change_limits("default", PLENTY)
            with Client(cluster.url, keys[0], retry_s=30) as client:
                cluster.tasks.register(client)
            with cluster.load(retry_s=30) as load:
                load.wait_for(60)
            assert (load.failures(), load.wrong) == ([], [])
            yield cluster
        finally:
            for node in [*cluster.nodes, *([cluster.head] if cluster.head else [])]:
                node.kill()
            gcs.end()
            shutil.rmtree(run_folder, ignore_errors=True)


def kill_node(cluster: Cluster, capacity_s: float = 180) -> Report:
    """kill -9 of a whole Ray node that has a worker; what callers saw that try again for a while."""
    with cluster.load(callers=6, retry_s=60) as load:
        load.wait_for(60)
        before = load.workers()
        victim = next(node for node in cluster.nodes if node.replicas("worker"))
        lost = {kind: len(victim.replicas(kind)) for kind in ("worker", "gateway")}
        at = time.monotonic()
        victim.kill()
        cluster.nodes.remove(victim)
        load.wait_for(100, capacity_s)
        wait_until(lambda: len(cluster.workers()) == 2, capacity_s, "two workers")
        back_s = load.wait_for_capacity(at, before, capacity_s)
        load.wait_for(40)
    report = load.report(at)
    report.capacity_s = back_s
    report.notes = {"lost": lost, "failures": load.failures()[:3]}
    return report


def kill_head(cluster: Cluster, away_s: float) -> Report:
    """kill -9 of the whole head, with GCS and Serve's controller; another one starts in its place after some seconds.

    Then a worker is killed, which only a controller that is back replaces.
    """
    assert cluster.head is not None
    with cluster.load(callers=6, retry_s=30) as load:
        load.wait_for(60)
        gateways = len(cluster.head.replicas("gateway"))
        at = time.monotonic()
        cluster.head.kill()
        time.sleep(away_s)
        during = load.report(at)
        load.wait_for(40)
        cluster.start_head()
        wait_until(lambda: _listens(cluster.port), 60, "the head")
        load.wait_for(60)
        before = load.workers()
        killed = time.monotonic()
        os.kill(cluster.workers()[0], signal.SIGKILL)
        back_s = load.wait_for_capacity(killed, before, 240)
        load.wait_for(40)
    report = load.report(at)
    report.capacity_s = back_s
    report.notes = {
        "gateways on the head": gateways,
        "answered without a head": during.asked - sum(during.failed.values()),
        "failures": sorted(set(load.failures()))[:5],
    }
    return report


def upgrade(cluster: Cluster, **changes: object) -> Report:
    """Other settings, under load: every replica is replaced by one of the new version."""
    with cluster.load(callers=6) as load:
        load.wait_for(60)
        before = set(cluster.workers())
        at = time.monotonic()
        cluster.deploy(**changes)
        took_s = time.monotonic() - at
        wait_until(lambda: not before & set(cluster.workers()), 120, "new workers alone")
        load.wait_for(60)
    report = load.report(at)
    report.capacity_s = round(took_s, 2)
    report.notes = {
        "changed": sorted(changes),
        "workers replaced": len(before),
        "workers that answered": len(load.workers(at)),
        "failures": sorted(set(load.failures()))[:5],
    }
    return report


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((LOOPBACK, port)) == 0


async def _first_keys(redis_url: str) -> tuple[str, str]:
    database = Database(redis_url)
    try:
        made = await first_keys(Tenants(database))
    finally:
        await database.close()
    assert made.owner is not None
    assert made.admin is not None
    return made.owner, made.admin


def main() -> None:
    import ray
    from ray import serve

    from hub.app import NAME, build

    settings = Settings.model_validate_json(sys.argv[2])
    ray.init(address=sys.argv[1], log_to_driver=False, _node_ip_address=LOOPBACK)
    serve.start(proxy_location="EveryNode", http_options={"host": settings.host, "port": settings.port})
    serve.run(build(settings), name=NAME, route_prefix="/")


if __name__ == "__main__":
    main()
