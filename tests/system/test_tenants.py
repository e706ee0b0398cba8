"""Two tenants under load while keys are revoked, limits changed and tasks deleted: no answer of the wrong adapter, and
none long after a revocation. A real hub; every adapter's labels name its tenant and task."""

import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from adapters import Backbone, load_backbone
from hub.client.client import Client
from hub.errors import HubError, LimitReached, NotFound, Unauthenticated
from hub.local.hub import free_port
from hub.schemas import LimitsChange
from tests.support.hub_process import Served, serve
from tests.support.models import png, random_adapter

pytestmark = pytest.mark.timeout(400)
TENANTS = ("acme", "bolt")
TASKS = ("flowers", "trees")
LOAD_S = 15.0
REVOKED_S = 2.0  # after which no answer may come


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Iterator[Served]:
    # Fewer slots than adapters, so that they come and go.
    hub = serve(tmp_path_factory.mktemp("home"), free_port(), HUB_SLOTS="3")
    yield hub
    hub.stop()


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_backbone("demo")


class Load:
    """What callers saw, and what was wrong with it."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.until = time.monotonic() + LOAD_S
        self.seen: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.ended: dict[str, float] = {}  # key -> when it was revoked

    def call(self, tenant: str, key: str, seed: int) -> None:
        """Classify until the time is over, or the key is."""
        rng = random.Random(seed)
        with Client(self.url, key, retry_s=0) as client:
            while time.monotonic() < self.until:
                task = rng.choice(TASKS)
                began = time.monotonic()
                try:
                    answer = client.classify(task, [png(rng.randrange(8))], top_k=3)
                except Unauthenticated:
                    self.seen["refused key"] += 1
                    if key not in self.ended:
                        self.wrong.append("a good key was refused")
                    return
                except (LimitReached, NotFound) as error:
                    self.seen[type(error).__name__] += 1
                    time.sleep(0.02)
                    continue
                except HubError as error:
                    self.wrong.append(f"{type(error).__name__}: {error}")
                    continue
                self.seen[tenant] += 1
                labels = {p.label for p in answer.predictions[0]}
                if not all(label.startswith(f"{tenant} {task} ") for label in labels):
                    self.wrong.append(f"{tenant} asked for {task} and got {labels}")
                if began > self.ended.get(key, float("inf")) + REVOKED_S:
                    self.wrong.append("an answer after the revocation")


def test_tenants_never_meet_and_revoked_keys_end(served, backbone) -> None:
    def adapter(tenant: str, task: str, seed: int) -> bytes:
        return random_adapter(backbone, seed, 3, [f"{tenant} {task} {k}" for k in range(3)]).data

    with Client(served.url, served.admin_key) as admin, ThreadPoolExecutor(16) as pool:
        owners = {}
        for i, tenant in enumerate(TENANTS):
            admin.create_tenant(tenant)
            owners[tenant] = Client(served.url, admin.create_key(tenant, "owner", role="owner").key)
            for j, task in enumerate(TASKS):
                owners[tenant].register(task, adapter(tenant, task, 10 * i + j))
        load = Load(served.url)
        jobs = []

        def caller(tenant: str, name: str):
            made = admin.create_key(tenant, name)
            jobs.append(pool.submit(load.call, tenant, made.key, len(jobs)))
            return made

        for tenant in TENANTS:
            caller(tenant, "stays")
        change = 0
        while time.monotonic() < load.until - 3:
            change += 1
            tenant = TENANTS[change % 2]
            key = caller(tenant, f"goes {change}")
            owners[tenant].delete_task("trees")
            limits = LimitsChange(images_per_second=2 if change % 4 < 2 else 1000)  # the owner can go on
            admin.change_limits("bolt", limits)
            time.sleep(0.5)
            owners[tenant].register("trees", adapter(tenant, "trees", 100 + change))
            admin.revoke_key(tenant, key.id)
            load.ended[key.key] = time.monotonic()
        for job in jobs:
            job.result()
        for client in owners.values():
            client.close()
    assert load.wrong == []
    assert 0 < load.seen["refused key"] <= change  # a caller may have been at the end of its time
    for key in load.ended:
        with Client(served.url, key, retry_s=0) as client, pytest.raises(Unauthenticated):
            client.tasks()
    assert min(load.seen[name] for name in (*TENANTS, "NotFound", "LimitReached")) > 0, load.seen
    assert threading.active_count() < 40
