"""One tenant's power over the registry that all tenants share: large tasks, and what response times reveal."""

import http.client
import json
import random
import time
from urllib.parse import urlsplit

import pytest

from adapters import Adapter, load_backbone
from tests.support.models import random_adapter, with_metadata
from tests.support.neighbours import Request, attacking, compare, send

from .conftest import AttackedHub, Victim

pytestmark = pytest.mark.slow
OTHERS = 900  # tenants that a task is shared with
SAMPLES = 400


@pytest.fixture(scope="module")
def small() -> Adapter:
    """An adapter file as small as the format allows."""
    return random_adapter(load_backbone("demo"), seed=5)


def register_large(hub: AttackedHub, key: str, adapter: Adapter, task: str, versions: int) -> None:
    """Register versions with 500 KB of metrics each."""
    with hub.client(key) as client:
        for i in range(versions):
            client.register(task, with_metadata(adapter, metrics=json.dumps({"notes": "m" * 500_000, "i": i})))


def test_victim_is_served_when_another_tenant_reads_and_lists_tasks_of_50_mb(
    hub: AttackedHub, victim: Victim, small: Adapter
) -> None:
    key = hub.tenant()
    register_large(hub, key, small, "large", 100)
    paths = ["/v1/tasks/large", "/v1/tasks", "/v1/tasks/large/versions/7", "/v2/models/large"]
    attack = [Request("GET", path, key) for path in paths]
    found = compare(hub.front, {"classify": victim.classify}, attack, at_once=4)["classify"]
    print(found)
    assert not found.beside.failed
    assert found.slower < 2 * hub.most_slower
    with attacking(hub.front, attack, at_once=4):
        statuses = {send(hub.front, Request("GET", "/v1/usage", victim.key)).status for _ in range(100)}
    assert statuses == {200}


def test_victim_is_served_when_another_tenant_deletes_tasks_and_versions_of_50_mb(
    hub: AttackedHub, victim: Victim, small: Adapter
) -> None:
    key = hub.tenant()
    for task in ("first", "second"):
        register_large(hub, key, small, task, 100)
    attack = [Request("DELETE", f"/v1/tasks/first/versions/{n}", key) for n in range(1, 100)]
    attack.insert(50, Request("DELETE", "/v1/tasks/second", key))
    found = compare(hub.front, {"classify": victim.classify}, attack, at_once=2)["classify"]
    print(found)
    assert found.replies[204] == 100
    assert not found.beside.failed
    assert found.slower < 2 * hub.most_slower


def test_response_times_are_alike_when_a_task_is_absent_private_or_shared_with_others(
    hub: AttackedHub, victim: Victim, small: Adapter
) -> None:
    owner, other = hub.tenant(), hub.tenant({"requests_per_second": 1e6})
    others = [f"other-{i:04}" + "y" * 50 for i in range(OTHERS)]
    with hub.client(hub.admin_key) as admin:
        for name in others:
            admin.create_tenant(name)
    with hub.client(owner) as client:
        tenant = client.usage().tenant
        for task in ("private", "given"):
            client.register(task, small.data)
        client.share("given", tenants=others)
        assert send(hub.front, Request("GET", f"/v1/tasks/{tenant}:given", other)).status == 404
    tasks = ("absent", "private", "given")
    place = urlsplit(hub.front.url)
    connection = http.client.HTTPConnection(str(place.hostname), place.port)
    if hub.front.tls is not None:  # nginx ends a connection after 1,000 requests, and another one must speak TLS too
        connection = http.client.HTTPSConnection(str(place.hostname), place.port, context=hub.front.tls)
    times: dict[str, list[float]] = {task: [] for task in tasks}
    answers = set()
    for _ in range(SAMPLES):
        for task in random.sample(tasks, len(tasks)):
            began = time.perf_counter()
            connection.request("GET", f"/v1/tasks/{tenant}:{task}", headers={"authorization": f"Bearer {other}"})
            reply = connection.getresponse()
            answers.add(reply.read().replace(task.encode(), b"TASK"))
            times[task].append(time.perf_counter() - began)
            assert reply.status == 404
    connection.close()
    assert len(answers) == 1
    fast = {task: sorted(found)[SAMPLES // 10] for task, found in times.items()}
    print({task: f"{1000 * found:.2f} ms" for task, found in fast.items()})
    assert max(fast.values()) < 1.5 * min(fast.values())
