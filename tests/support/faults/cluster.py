"""A hub on several Ray nodes, each with processes of its own that can be killed together; all on this machine.

python -m tests.support.faults.cluster ADDRESS '<JSON of Settings>'    puts the application on a cluster, as
`serve deploy` would; again with other settings, it is an upgrade.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from adapters import Backbone
from hub.admin_schemas import LimitsChange
from hub.client.client import Client
from hub.local.embedded_redis import embedded_redis
from hub.local.ports import free_port
from hub.local.ray_environment import ray_environment
from hub.settings import Settings
from tests.support.faults.load import Load, RedisServer, Report, Tasks, replicas
from tests.support.hub_app import first_keys_of
from tests.support.hub_process import alive, descendants
from tests.support.models import listens, wait_until

RAY = Path(sys.executable).parent / "ray"
LOOPBACK = "127.0.0.1"
TASKS = 6
PLENTY = LimitsChange(requests_per_second=10_000, images_per_second=10_000)


@dataclass
class Node:
    """`ray start --block` and everything below it; `host` is where its HAProxy listens."""

    process: subprocess.Popen[bytes]
    host: str

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
    """A head without CPUs for replicas, and nodes with two each. Every node that has replicas has an HAProxy on an
    address of its own (127.0.0.2, ...). Ray's state (its GCS) is in its own Redis, for a head that comes back.
    """

    settings: Settings
    environment: dict[str, str]
    folder: Path
    run_folder: Path
    tasks: Tasks
    key: str
    admin_key: str
    port: int
    head: Node | None = None
    nodes: list[Node] = field(default_factory=list)
    started: int = 0

    def urls(self) -> list[str]:
        """Return the URLs of the nodes that have replicas, and so take requests."""
        takers = [n for n in self.nodes if n.replicas("worker") or n.replicas("gateway")]
        wait_until(lambda: all(listens(self.settings.port, n.host) for n in takers), 60, "the nodes' HAProxies")
        return [f"http://{node.host}:{self.settings.port}" for node in takers]

    def load(self, urls: Sequence[str] | None = None, **options: object) -> Load:
        return Load(urls or self.urls(), self.key, self.tasks, **options)  # type: ignore[arg-type]

    def start_head(self) -> None:
        temp = self.run_folder / "ray"
        # On one machine Ray takes the nodes that wait for a new head for a head that runs, if it finds this.
        (temp / "ray_current_cluster").unlink(missing_ok=True)
        options = ["--port", str(self.port), "--num-cpus", "0", "--include-dashboard", "false", "--temp-dir", str(temp)]
        self.head = self._start("--head", *options)

    def add_node(self) -> None:
        self.nodes.append(self._start("--address", f"{LOOPBACK}:{self.port}", "--num-cpus", "2"))

    def deploy(self, **changes: object) -> None:
        """Put the application there, or change it; returns when it runs."""
        self.settings = self.settings.model_copy(update=changes)
        command = [sys.executable, "-m", "tests.support.faults.cluster"]
        command += [f"{LOOPBACK}:{self.port}", self.settings.model_dump_json()]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=150)
        assert done.returncode == 0, done.stderr[-3000:]

    def head_url(self) -> str:
        """Return the URL of the head's HAProxy, which stays while nodes come and go."""
        assert self.head is not None
        host = self.head.host
        wait_until(lambda: listens(self.settings.port, host), 60, "the head's HAProxy")
        return f"http://{host}:{self.settings.port}"

    def workers(self) -> list[int]:
        return [pid for node in self.nodes for pid in node.replicas("worker")]

    def _start(self, *options: str) -> Node:
        self.started += 1
        host = f"127.0.0.{self.started}"
        folder = self.run_folder / str(self.started)
        folder.mkdir()
        own = ray_environment(self.settings.model_copy(update={"host": host}), folder)
        command = [str(RAY), "start", "--block", "--disable-usage-stats", "--node-ip-address", LOOPBACK, *options]
        command += ["--object-store-memory", str(128 * 1024**2)]
        environment = own | self.environment | {name: own[name] for name in own if "HAPROXY" in name}
        log = self.folder / f"ray-{self.started}.log"
        with log.open("wb") as file:
            node = Node(subprocess.Popen(command, env=environment, stdout=file, stderr=file), host)
        # Two nodes of one machine that start at a time may take the same names for their sockets.
        try:
            wait_until(lambda: b"runtime started" in log.read_bytes() or node.process.poll() is not None, 60, "Ray")
            assert node.process.poll() is None, f"Ray does not start: {log.read_text(errors='replace')[-2000:]}"
        except AssertionError:
            node.kill()
            raise
        return node


@contextmanager
def hub_on_a_cluster(folder: Path, backbone: Backbone, gateways: int = 2, **changes: object) -> Iterator[Cluster]:
    """A head and two nodes, two workers, its tasks registered and warm; kills all of it at the end.

    Args:
        changes: further settings.
    """
    run_folder = Path(tempfile.mkdtemp(prefix="karst-hub-"))  # short, as paths of sockets have to be
    (folder / "gcs").mkdir()
    gcs_port = free_port()
    gcs = RedisServer(folder / "gcs", gcs_port)
    with embedded_redis(folder) as redis_url:
        settings = Settings(
            backbone="demo", home=folder, redis_url=redis_url, store_url=str(folder / "store"), port=free_port(),
            min_workers=2, max_workers=2, min_gateways=gateways, max_gateways=gateways,
        ).model_copy(update=changes)  # fmt: skip
        environment = os.environ | ray_environment(settings, run_folder)
        environment |= {"RAY_REDIS_ADDRESS": f"{LOOPBACK}:{gcs_port}", "RAY_external_storage_namespace": "karst"}
        keys = _first_keys(redis_url)
        cluster = Cluster(settings, environment, folder, run_folder, Tasks(backbone, TASKS), *keys, free_port())
        try:
            gcs.start()
            wait_until(lambda: listens(gcs_port), 30, "Ray's Redis")
            cluster.start_head()
            cluster.add_node()
            cluster.add_node()
            cluster.deploy()
            url = cluster.urls()[0]
            with Client(url, keys[1], retry_s=30) as admin:
                admin.change_limits("default", PLENTY)
            with Client(url, keys[0], retry_s=30) as client:
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
    """Kill a whole Ray node that has a worker; return the results of retrying callers of other nodes."""
    victim = next(node for node in cluster.nodes if node.replicas("worker"))
    others = [url for url in cluster.urls() if victim.host not in url]  # where a load balancer sends callers then
    assert others, "the node has all replicas; its callers can reach no other one"
    with cluster.load(others, callers=6, retry_s=60) as load:
        load.wait_for(60)
        before = load.workers()
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


def upgrade_often(cluster: Cluster, times: int) -> Report:
    """Upgrade several times in a row, under one load of callers that never retry; count every lost call.

    The callers use the head's HAProxy. The head keeps it throughout, while a node without replicas stops its own.
    """
    replaced = []
    with cluster.load([cluster.head_url()], callers=6) as load:
        load.wait_for(60)
        at = time.monotonic()
        for i in range(times):
            before = set(cluster.workers())
            cluster.deploy(slots=40 + i, batch_wait_ms=2.0 + i)
            wait_until(lambda before=before: not before & set(cluster.workers()), 120, "new workers alone")  # type: ignore[misc]
            replaced.append(len(before))
            load.wait_for(60)
        took_s = time.monotonic() - at
    report = load.report(at)
    report.capacity_s = round(took_s / times, 2)
    report.notes = {"upgrades": times, "workers replaced": replaced, "failures": sorted(set(load.failures()))[:5]}
    return report


def _first_keys(redis_url: str) -> tuple[str, str]:
    made = first_keys_of(redis_url)
    assert made.owner is not None
    assert made.admin is not None
    return made.owner, made.admin


def main() -> None:
    import ray
    from ray import serve

    from hub.cluster.app import NAME, build

    settings = Settings.model_validate_json(sys.argv[2])
    ray.init(address=sys.argv[1], log_to_driver=False, _node_ip_address=LOOPBACK)
    serve.start(proxy_location="EveryNode", http_options={"host": settings.host, "port": settings.port})
    serve.run(build(settings), name=NAME, route_prefix="/")


if __name__ == "__main__":
    main()
