"""Load up, load down: workers and nodes come and go, to none and back, and not one request fails. Real clusters."""

import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from adapters import Adapter, load_backbone
from hub.client.client import Client
from hub.local.embedded_redis import embedded_redis
from hub.local.hub import new_admin_key
from hub.local.ports import free_port
from hub.settings import Settings
from tests.support.hub_process import alive, command, descendants, serve
from tests.support.models import png, random_adapter, wait_until

pytestmark = pytest.mark.long
BIN = Path(sys.executable).parent
SERVE_YAML = Path(__file__).parents[2] / "deploy" / "serve.yaml"
WORKER, NODE = "ray::ServeReplica:karst-hub:worker", "/raylet/raylet "
CHANGE_S = 150.0  # for a replica or a node to come or to go, on a busy machine
QUICK = {"HUB_SCALE_UP_S": "1", "HUB_SCALE_DOWN_S": "4"}
IMAGES = 8  # in a heavy call: more than a worker's share, for any batch size
TASKS = 4


@pytest.fixture(scope="module")
def adapters() -> list[Adapter]:
    backbone = load_backbone("demo")
    return [random_adapter(backbone, i, 3, [f"task {i} class {k}" for k in range(3)]) for i in range(TASKS)]


def register(url: str, key: str, adapters: list[Adapter]) -> None:
    with Client(url, key, timeout_s=CHANGE_S, retry_s=0) as client:
        for i, adapter in enumerate(adapters):
            client.register(f"task{i}", adapter.data, labels_may_change=True)


class Load:
    """Callers that never try again: every failure is seen. Heavy calls come all at once, light ones from one caller."""

    def __init__(self, url: str, key: str) -> None:
        self._url, self._key = url, key
        self._stop, self.heavy = threading.Event(), threading.Event()
        self.answers: Counter[int] = Counter()
        self.wrong: list[str] = []
        self.workers: set[str] = set()

    def _call(self, number: int) -> None:
        files = [("images", (f"{i}.png", png(i), "image/png")) for i in range(IMAGES)]
        with httpx.Client(base_url=self._url, headers={"authorization": f"Bearer {self._key}"}, timeout=120) as http:
            turn = number
            while not self._stop.is_set():
                if number and not self.heavy.wait(0.1):
                    continue
                turn += 1
                task = turn % TASKS
                answer = http.post(f"/v1/tasks/task{task}/classify", files=files if number else files[:1])
                self.answers[answer.status_code] += 1
                if answer.status_code != 200:
                    self.wrong.append(answer.text)
                    continue
                self.workers.add(answer.headers["x-worker"])
                if any(
                    not label["label"].startswith(f"task {task} ") for p in answer.json()["predictions"] for label in p
                ):
                    self.wrong.append(f"task {task}: {answer.text}")
                if not number:
                    time.sleep(0.2)

    @contextmanager
    def running(self, callers: int = 16) -> Iterator[None]:
        with ThreadPoolExecutor(callers + 1) as pool:
            jobs = [pool.submit(self._call, number) for number in range(callers + 1)]
            try:
                yield
            finally:
                self._stop.set()
            for job in jobs:
                job.result()
        assert self.wrong == []
        assert set(self.answers) == {200}


def until(true: Callable[[], bool], what: Callable[[], object]) -> None:
    wait_until(true, CHANGE_S, what)


def count(pid: int, name: str) -> int:
    """Processes under this one whose command begins with, or has, this name."""
    return sum(name in command(child) and alive(child) for child in descendants(pid))


def test_workers_come_with_the_load_and_go_with_it(tmp_path: Path, adapters: list[Adapter]) -> None:
    hub = serve(tmp_path, free_port(), HUB_MAX_WORKERS="2", **QUICK)
    try:
        register(hub.url, str(hub.key), adapters)
        load = Load(hub.url, str(hub.key))

        def workers() -> int:
            return count(hub.process.pid, WORKER)

        assert workers() == 1
        with load.running():
            load.heavy.set()
            until(lambda: len(load.workers) == 2, lambda: (workers(), load.answers))
            assert workers() == 2
            load.heavy.clear()
            until(lambda: workers() == 1, lambda: (workers(), load.answers))
            answered = load.answers[200]
            until(lambda: load.answers[200] > answered + 5, lambda: load.answers)
    finally:
        hub.stop()


def test_the_last_worker_goes_and_the_next_request_waits_for_one(tmp_path: Path, adapters: list[Adapter]) -> None:
    hub = serve(tmp_path, free_port(), HUB_MIN_WORKERS="0", HUB_MAX_WORKERS="1", **QUICK)
    try:
        key = str(hub.key)
        register(hub.url, key, adapters)
        until(lambda: count(hub.process.pid, WORKER) == 0, lambda: "a worker stays")
        assert httpx.get(f"{hub.url}/readyz").status_code == 200
        register(hub.url, key, [random_adapter(load_backbone("demo"), 99, 3, ["a", "b", "c"])])  # checked without one
        until(lambda: count(hub.process.pid, WORKER) == 0, lambda: "a worker stays after registering")
        register(hub.url, key, adapters[:1])

        def one(i: int) -> str:
            with Client(hub.url, key, timeout_s=CHANGE_S, retry_s=0) as client:
                return client.classify(f"task{i % TASKS}", [png(i)], top_k=1).predictions[0][0].label

        with ThreadPoolExecutor(20) as pool:
            labels = list(pool.map(one, range(20)))
        assert [label.startswith(f"task {i % TASKS} ") for i, label in enumerate(labels)] == [True] * 20
        until(lambda: count(hub.process.pid, WORKER) == 0, lambda: "the worker stays")
    finally:
        hub.stop()


def test_one_request_for_many_tasks_reaches_all_their_workers(tmp_path: Path, adapters: list[Adapter]) -> None:
    """Its calls to workers run concurrently, and Serve gives all of them one id."""
    hub = serve(tmp_path, free_port(), HUB_MIN_WORKERS="2", HUB_MAX_WORKERS="2")
    try:
        register(hub.url, str(hub.key), adapters)
        with Client(hub.url, str(hub.key), timeout_s=30, retry_s=0) as client:
            for _ in range(20):
                inputs = [(f"task{i % TASKS}", png(i)) for i in range(12)]
                results = client.classify_inputs(inputs, top_k=1).results
                assert [r.predictions[0].label[:7] for r in results] == [f"task {i % TASKS} " for i in range(12)]
    finally:
        hub.stop()


@dataclass
class Cluster:
    """A Ray head whose autoscaler starts nodes as processes, with the hub of deploy/serve.yaml on it."""

    pid: int
    url: str
    key: str

    def workers(self) -> int:
        return count(self.pid, WORKER)

    def nodes(self) -> int:
        return count(self.pid, NODE)


@contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """`ray start --head` and `serve run`, as in docs, with Ray's fake provider of nodes. Ends what it started, only."""
    gcs, http, dashboard = free_port(), free_port(), free_port()
    address, store = f"127.0.0.1:{gcs}", folder / "store"
    with ExitStack() as stack:
        redis = stack.enter_context(embedded_redis(folder))
        config = yaml.safe_load(SERVE_YAML.read_text())
        # All nodes are one machine here, with one port for HTTP.
        config |= {"proxy_location": "HeadOnly", "http_options": {"host": "127.0.0.1", "port": http}}
        config["applications"][0]["args"] |= {"max_workers": 2, "max_gateways": 1, "scale_up_s": 1, "scale_down_s": 4}
        (folder / "serve.yaml").write_text(yaml.safe_dump(config))
        (folder / "nodes.yaml").write_text(yaml.safe_dump(_nodes(address)))
        environment = os.environ | {
            "HUB_BACKBONE": "demo",
            "HUB_REDIS_URL": redis,
            "HUB_STORE_URL": str(store),
            "HUB_DEVICE": "cpu",
            "RAY_FAKE_CLUSTER": "1",
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
        }
        head = [
            str(BIN / "ray"),
            "start",
            "--head",
            "--block",
            "--num-cpus=1",
            f"--port={gcs}",
            "--node-ip-address=127.0.0.1",
        ]
        head += ["--include-dashboard=false", f"--dashboard-port={dashboard}", "--object-store-memory=100000000"]
        head += [f"--autoscaling-config={folder / 'nodes.yaml'}", f"--temp-dir={folder / 'r'}"]
        process = stack.enter_context(running(head, environment, folder / "head.log"))
        run = [str(BIN / "serve"), "run", str(folder / "serve.yaml"), f"--address={address}"]
        stack.enter_context(running(run, environment, folder / "serve.log"))
        url = f"http://127.0.0.1:{http}"
        until(lambda: ready(url), lambda: [(folder / f"{name}.log").read_text()[-3000:] for name in ("head", "serve")])
        admin = new_admin_key(Settings(redis_url=redis, home=folder))
        with httpx.Client(base_url=url, headers={"authorization": f"Bearer {admin}"}) as client:
            client.post("/v1/tenants", json={"tenant": "acme"}).raise_for_status()
            made = client.post("/v1/tenants/acme/keys", json={"name": "test", "role": "owner"}).raise_for_status()
        yield Cluster(process.pid, url, made.json()["key"])


def _nodes(address: str) -> dict[str, Any]:
    return {
        "cluster_name": "fake",
        "max_workers": 1,
        "idle_timeout_minutes": 0.1,
        "provider": {
            "type": "fake_multinode",
            "gcs_address": address,
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 1}, "node_config": {}, "max_workers": 0},
            "small": {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 1},
        },
        "auth": {},
        "docker": {},
        "file_mounts": {},
        **{f"{kind}setup_commands": [] for kind in ("", "head_", "worker_")},
        **{f"{kind}_start_ray_commands": [] for kind in ("head", "worker")},
        **{name: [] for name in ("initialization_commands", "cluster_synced_files")},
    }


@contextmanager
def running(arguments: list[str], environment: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A command with everything it starts, all of which is gone at the end."""
    with log.open("wb") as out:
        process = subprocess.Popen(arguments, env=environment, stdout=out, stderr=subprocess.STDOUT, cwd=log.parent)
    try:
        yield process
    finally:
        group = [process.pid, *descendants(process.pid)]
        process.send_signal(signal.SIGINT if "serve" in arguments[0] else signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
        for pid in group:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        process.wait(10)


def ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def test_nodes_come_and_go_with_the_load(tmp_path_factory: pytest.TempPathFactory, adapters: list[Adapter]) -> None:
    folder = tmp_path_factory.mktemp("c")
    with cluster(folder) as hub:
        register(hub.url, hub.key, adapters)
        assert (hub.nodes(), hub.workers()) == (1, 1)
        load = Load(hub.url, hub.key)
        with load.running():
            load.heavy.set()
            until(lambda: len(load.workers) == 2, lambda: (hub.nodes(), hub.workers(), load.answers))
            assert (hub.nodes(), hub.workers()) == (2, 2)
            load.heavy.clear()
            until(lambda: (hub.nodes(), hub.workers()) == (1, 1), lambda: (hub.nodes(), hub.workers(), load.answers))
            answered = load.answers[200]
            until(lambda: load.answers[200] > answered + 5, lambda: load.answers)
