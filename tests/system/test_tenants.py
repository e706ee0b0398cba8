"""Two tenants under load while keys are revoked, limits changed and tasks deleted.

The labels of every adapter name its tenant and task, so each answer shows which adapter gave it.
"""

import random
import threading
import time
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from adapters import Backbone
from hub.admin_schemas import LimitsChange, NewKey
from hub.client.client import Client
from hub.errors import HubError, LimitReached, NotFound, Unauthenticated
from tests.support.models import png, random_adapter

from .conftest import SharedHub

TENANTS = ("acme", "bolt")
TASKS = ("flowers", "trees")
CHANGES = 12
REVOKED_S = 2.0  # after the revocation of a key, the latest start of a call that may succeed


class Load:
    """Callers of two tenants, the counts of their results, and the errors that they met."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.ended = threading.Event()
        self.seen: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.revoked: dict[str, float] = {}  # key -> end of its revocation

    def call(self, tenant: str, key: str, seed: int) -> None:
        """Classify until the load ends or the key is refused."""
        rng = random.Random(seed)
        with Client(self.url, key, retry_s=0) as client:
            while not self.ended.is_set():
                task = rng.choice(TASKS)
                began = time.monotonic()
                try:
                    answer = client.classify(task, [png(rng.randrange(8))], top_k=3)
                except Unauthenticated:
                    self.seen["refused key"] += 1
                    if key not in self.revoked:
                        self.wrong.append("a valid key was refused")
                    return
                except (LimitReached, NotFound) as error:
                    self.seen[type(error).__name__] += 1
                    self.ended.wait(0.02)
                    continue
                except HubError as error:
                    self.wrong.append(f"{type(error).__name__}: {error}")
                    continue
                self.seen[tenant] += 1
                labels = {p.label for p in answer.predictions[0]}
                if not all(label.startswith(f"{tenant} {task} ") for label in labels):
                    self.wrong.append(f"{tenant} called {task} and got {labels}")
                if began > self.revoked.get(key, float("inf")) + REVOKED_S:
                    self.wrong.append("an answer after the revocation")


def test_tenants_never_get_answers_of_each_other_and_revoked_keys_are_refused(
    hub: SharedHub, backbone: Backbone
) -> None:
    def adapter(tenant: str, task: str, seed: int) -> bytes:
        return random_adapter(backbone, seed, 3, [f"{tenant} {task} {k}" for k in range(3)]).data

    load = Load(hub.url)
    owners: dict[str, Client] = {}
    jobs: list[Future[None]] = []
    with Client(hub.url, hub.admin_key) as admin, ThreadPoolExecutor(16) as pool:
        try:
            for i, tenant in enumerate(TENANTS):
                admin.create_tenant(tenant)
                owners[tenant] = Client(hub.url, admin.create_key(tenant, "owner", role="owner").key)
                for j, task in enumerate(TASKS):
                    owners[tenant].register(task, adapter(tenant, task, 10 * i + j))

            def caller(tenant: str, name: str) -> NewKey:
                made = admin.create_key(tenant, name)
                jobs.append(pool.submit(load.call, tenant, made.key, len(jobs)))
                return made

            for tenant in TENANTS:
                caller(tenant, "stays")
            for change in range(1, CHANGES + 1):
                tenant = TENANTS[change % 2]
                key = caller(tenant, f"goes {change}")
                owners[tenant].delete_task("trees")
                few = change % 4 < 2  # the owner can still register, and a slow machine still reaches the limit
                admin.change_limits("bolt", LimitsChange(images_per_second=0.1 if few else 1000))
                load.ended.wait(0.5)
                owners[tenant].register("trees", adapter(tenant, "trees", 100 + change), labels_may_change=True)
                load.revoked[key.key] = float("inf")  # from now on the key may be refused
                admin.revoke_key(tenant, key.id)
                load.revoked[key.key] = time.monotonic()
            load.ended.wait(REVOKED_S + 1)  # callers whose keys are revoked meet the refusal
        finally:
            load.ended.set()
            for client in owners.values():
                client.close()
        for job in jobs:
            job.result()
    assert load.wrong == []
    assert load.seen["refused key"] == CHANGES
    for revoked in load.revoked:
        with Client(hub.url, revoked, retry_s=0) as client, pytest.raises(Unauthenticated):
            client.tasks()
    assert min(load.seen[name] for name in (*TENANTS, "NotFound", "LimitReached")) > 0, load.seen
