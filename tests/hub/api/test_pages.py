"""Lists in pages: each entry once, in order, and no list of one tenant hides another tenant's entry."""

from typing import Any

import pytest

from adapters import Adapter
from hub.registry.audit import OPERATOR
from hub.registry.keys import KeyRegistry
from hub.registry.redis.connection import RegistryConnection
from hub.registry.tasks import TaskRegistry
from hub.schemas import Sharing
from tests.support.hub_app import OCTETS, Hub, in_registry
from tests.support.models import with_metadata
from tests.support.registry import version


def pages(
    hub: Hub, path: str, member: str, limit: int, headers: dict[str, str] | None = None, **asked: str
) -> list[list[Any]]:
    """Return the entries of each page of a list."""
    found: list[list[Any]] = []
    params: dict[str, Any] = {"limit": limit} | asked
    while True:
        reply = hub.http.get(path, params=params, headers=headers)
        assert reply.status_code == 200, reply.text
        found.append(reply.json()[member])
        if "next" not in reply.json():
            return found
        params["cursor"] = reply.json()["next"]


def register(hub: Hub, tasks: dict[str, Sharing], tenant: str = "default") -> None:
    """Register tasks in the registry alone, with this sharing."""

    async def use(connection: RegistryConnection) -> None:
        registry = TaskRegistry(connection)
        for task, sharing in tasks.items():
            await registry.register(OPERATOR, tenant, task, version("a" * 64), ["latest"])
            await registry.share(OPERATOR, tenant, task, sharing)

    in_registry(hub.redis_url, use)


def test_pages_have_each_task_once_when_a_tenant_has_own_named_and_public_tasks(hub: Hub) -> None:
    friend = hub.key_of("friend")
    for other in ("zoo", "other"):
        hub.key_of(other)
    register(hub, {f"own-{i}": Sharing() for i in range(3)}, "friend")
    register(hub, {f"open-{i}": Sharing(public=True) for i in range(3)})
    register(hub, {"both": Sharing(public=True, tenants=["friend"]), "private": Sharing(tenants=["other"])})
    register(hub, {"named": Sharing(tenants=["friend"]), "open": Sharing(public=True)}, "zoo")
    expected = [*(f"own-{i}" for i in range(3)), "default:both", "zoo:named"]
    expected += [*(f"default:open-{i}" for i in range(3)), "zoo:open"]
    for limit in (1, 2, 3, 4, 9, 1000):
        found = pages(hub, "/v1/tasks", "tasks", limit, friend)
        assert [entry["task"] for page in found for entry in page] == expected
        assert max(map(len, found)) <= limit
        assert all(found)  # no page is empty


def test_a_task_shared_by_name_is_on_the_first_page_when_a_tenant_has_a_thousand_public_tasks(hub: Hub) -> None:
    friend = hub.key_of("friend")
    hub.key_of("zoo")
    register(hub, {f"open-{i:03}": Sharing(public=True) for i in range(1000)})
    register(hub, {"named": Sharing(tenants=["friend"])}, "zoo")
    first, second = pages(hub, "/v1/tasks", "tasks", 1000, friend)
    assert first[0]["task"] == "zoo:named"
    assert (len(first), len(second)) == (1000, 1)


def test_a_key_bound_to_a_task_gets_only_this_task_when_the_list_has_several_pages(hub: Hub) -> None:
    register(hub, {f"task-{i}": Sharing() for i in range(5)})

    async def make(connection: RegistryConnection) -> str:
        keys = KeyRegistry(connection)
        return (await keys.create(OPERATOR, "default", "caller", "bound", tasks=["task-4"])).key

    header = {"authorization": f"Bearer {in_registry(hub.redis_url, make)}"}
    found = pages(hub, "/v1/tasks", "tasks", 2, header)
    assert [entry["task"] for page in found for entry in page] == ["task-4"]


def test_pages_of_versions_are_bounded_by_their_number_and_their_bytes(hub: Hub, adapters: list[Adapter]) -> None:
    url = "/v1/tasks/flowers"
    for adapter in adapters[:3]:
        assert hub.http.post(f"{url}/versions", content=adapter.data, headers=OCTETS).status_code == 201
    whole = hub.http.get(url).json()
    assert "next" not in whole
    found = pages(hub, url, "versions", 2)
    assert [len(page) for page in found] == [2, 1]
    assert [entry for page in found for entry in page] == whole["versions"]
    assert whole["versions"][0] == hub.http.get(f"{url}/versions/1").json()
    for i in range(4):
        file = with_metadata(adapters[0], metrics='{"notes": "' + "m" * 150_000 + f'", "i": {i}}}')
        assert hub.http.post(f"{url}/versions", content=file, headers=OCTETS).status_code == 201
    assert [len(page) for page in pages(hub, url, "versions", 1000)] == [6, 1]
    changed = hub.http.put(f"{url}/aliases/stable", json={"version": 7}).json()
    assert len(changed["versions"]) == 6
    assert changed["next"] == "6"


def test_pages_have_each_key_and_each_tenant_once(hub: Hub) -> None:
    async def make(connection: RegistryConnection) -> list[str]:
        keys = KeyRegistry(connection)
        return [(await keys.create(OPERATOR, "default", "caller", f"key {i}")).id for i in range(60)]

    made = in_registry(hub.redis_url, make)
    for limit in (7, 60, 1000):
        found = pages(hub, "/v1/tenants/default/keys", "keys", limit)
        ids = [entry["id"] for page in found for entry in page]
        assert len(ids) == len(set(ids)) == 61
        assert {*made} < {*ids}
    for name in ("acme", "zoo"):
        hub.key_of(name)
    found = pages(hub, "/v1/tenants", "tenants", 2, hub.admin)
    assert [[entry["tenant"] for entry in page] for page in found] == [["acme", "default"], ["zoo"]]
    assert [len(page) for page in pages(hub, "/v1/admin/keys", "keys", 1, hub.admin)] == [1]


@pytest.mark.parametrize(
    ("path", "params"),
    [
        ("/v1/tasks", {"limit": 0}),
        ("/v1/tasks", {"limit": 1001}),
        ("/v1/tasks", {"cursor": "all:x"}),
        ("/v1/tasks/x", {"cursor": "0"}),
        ("/v1/tenants/default/keys", {"limit": 1001}),
    ],
)
def test_a_limit_or_a_cursor_is_refused_when_no_page_can_have_it(hub: Hub, path: str, params: dict[str, Any]) -> None:
    reply = hub.http.get(path, params=params)
    assert reply.status_code == 422
    assert reply.json()["errors"][0]["field"] == next(iter(params))
    if "cursor" in params:
        assert "the value `next` of the previous page" in reply.json()["detail"]


def test_tasks_are_listed_in_the_order_that_the_client_names(hub: Hub, adapters: list[Adapter]) -> None:
    for name in ("b", "a"):
        hub.http.put(f"/v1/tasks/{name}", json={})
    hub.http.post("/v1/tasks/c/versions", content=adapters[0].data)
    for sort, order, names in (("name", "asc", "abc"), ("name", "desc", "cba"), ("labels", "desc", "cba")):
        for limit in (1, 10):
            found = pages(hub, "/v1/tasks", "tasks", limit, sort=sort, order=order)
            assert [task["task"] for page in found for task in page] == list(names)
    refused = hub.http.get("/v1/tasks?sort=colour")
    assert (refused.status_code, "registered" in refused.json()["detail"]) == (422, True)
