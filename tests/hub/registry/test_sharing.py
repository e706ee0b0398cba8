"""Sharing of tasks: another tenant may see a task and classify with it, until the owner ends the sharing."""

import base64
from typing import Any

import redis

from adapters import Adapter
from tests.support.hub_app import OCTETS, Hub
from tests.support.models import png, wait_until

URL = "/v1/tasks/default:flowers"


def share(hub: Hub, **body: Any) -> Any:
    reply = hub.http.put("/v1/tasks/flowers/sharing", json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()


def test_another_tenant_classifies_with_a_shared_task_and_cannot_change_it(hub: Hub, adapters: list[Adapter]) -> None:
    hub.http.post("/v1/tasks/flowers/versions", content=adapters[0].data, headers=OCTETS)
    friend, stranger = hub.key_of("friend"), hub.key_of("stranger")
    own = hub.http.post("/v1/tasks/flowers/classify", content=png()).json()
    assert share(hub, tenants=["friend"])["sharing"] == {"public": False, "tenants": ["friend"]}

    reply = hub.http.post(f"{URL}/classify", content=png(), headers=friend).json()
    assert reply == own | {"task": "default:flowers"}
    inputs = [{"task": "default:flowers", "image": base64.b64encode(png()).decode()}]
    several = hub.http.post("/v1/classify", json={"inputs": inputs}, headers=friend).json()
    assert several["results"][0]["predictions"] == own["predictions"][0]
    seen = hub.http.get(URL, headers=friend).json()
    assert (seen["task"], seen["labels"], seen["sharing"]) == ("default:flowers", list(adapters[0].labels), None)
    assert [t["task"] for t in hub.http.get("/v1/tasks", headers=friend).json()["tasks"]] == ["default:flowers"]
    assert hub.http.get("/v1/tasks", headers=stranger).json() == {"tasks": []}
    assert hub.http.post(f"{URL}/classify", content=png(), headers=stranger).status_code == 404

    for method, path in (
        ("GET", "/versions/1/file"),
        ("DELETE", ""),
        ("DELETE", "/versions/1"),
        ("PUT", "/aliases/stable"),
        ("PUT", "/sharing"),
    ):
        body: dict[str, Any] = (
            {"json": {"version": 1} if "alias" in path else {"public": True}} if method == "PUT" else {}
        )
        assert hub.http.request(method, URL + path, headers=friend, **body).status_code == 404
    # The use counts for the friend, not for the owner.
    keys: tuple[dict[str, str], ...] = (friend, {})  # without a header the client sends the owner's key
    wait_until(lambda: [hub.http.get("/v1/usage", headers=k).json()["counted"]["images"] for k in keys] == [2, 1])


def test_a_task_is_public_until_its_owner_ends_the_sharing(hub: Hub, adapters: list[Adapter]) -> None:
    hub.http.post("/v1/tasks/flowers/versions", content=adapters[0].data, headers=OCTETS)
    friend = hub.key_of("friend")
    with hub.another_gateway() as elsewhere:
        share(hub, public=True)
        for gateway in (hub.http, elsewhere):
            assert gateway.post(f"{URL}/classify", content=png(), headers=friend).status_code == 200
        share(hub)
        assert hub.http.post(f"{URL}/classify", content=png(), headers=friend).status_code == 404
        wait_until(lambda: elsewhere.post(f"{URL}/classify", content=png(), headers=friend).status_code == 404, 2)
        assert hub.http.get("/v1/tasks", headers=friend).json() == {"tasks": []}
    share(hub, public=True)
    hub.http.delete("/v1/tasks/flowers")
    assert hub.http.get("/v1/tasks", headers=friend).json() == {"tasks": []}
    hub.http.post("/v1/tasks/flowers/versions", content=adapters[0].data, headers=OCTETS)
    assert hub.http.get(URL, headers=friend).status_code == 404  # the new task of the same name is not shared


def test_a_tenant_reaches_its_own_task_by_its_full_name(hub: Hub, adapters: list[Adapter]) -> None:
    hub.http.post("/v1/tasks/default:flowers/versions", content=adapters[0].data, headers=OCTETS)
    assert hub.http.get("/v1/tasks/flowers").json()["task"] == "flowers"
    assert hub.http.post(f"{URL}/classify", content=png()).status_code == 200
    assert hub.http.delete(URL).status_code == 204


def test_a_new_tenant_with_the_name_of_a_deleted_one_sees_no_shared_task(hub: Hub, adapters: list[Adapter]) -> None:
    hub.http.post("/v1/tasks/flowers/versions", content=adapters[0].data, headers=OCTETS)
    friend = hub.key_of("friend")
    hub.key_of("other")
    share(hub, tenants=["friend", "other"])
    assert hub.http.post(f"{URL}/classify", content=png(), headers=friend).status_code == 200
    hub.http.delete("/v1/tenants/friend", headers=hub.admin)
    again = hub.key_of("friend")
    assert hub.http.post(f"{URL}/classify", content=png(), headers=again).status_code == 404
    assert hub.http.get("/v1/tasks/flowers").json()["sharing"] == {"public": False, "tenants": ["other"]}


def test_redis_does_the_same_work_for_a_stranger_whether_the_task_is_absent_private_or_shared_with_others(
    hub: Hub, adapters: list[Adapter]
) -> None:
    for task in ("private", "given"):
        hub.http.post(f"/v1/tasks/{task}/versions", content=adapters[0].data, headers=OCTETS)
    others = [f"other-{i}" for i in range(900)]
    for other in others:
        hub.http.post("/v1/tenants", json={"tenant": other}, headers=hub.admin)
    assert hub.http.put("/v1/tasks/given/sharing", json={"tenants": others}).status_code == 200
    stranger = hub.key_of("stranger")
    hub.http.get("/v1/tasks/default:absent", headers=stranger)  # the gateway knows the key from now on
    commands = []
    with redis.Redis.from_url(hub.redis_url, decode_responses=True) as client, client.monitor() as monitor:
        for task in ("absent", "private", "given"):
            reply = hub.http.get(f"/v1/tasks/default:{task}", headers=stranger)
            assert reply.status_code == 404
            client.echo("end")
            seen = []
            while (command := str(monitor.next_command()["command"])) != "ECHO end":
                if "default:" in command:
                    seen.append(command.replace(task, "task"))
            commands.append(seen)
    assert commands[0]
    assert commands[0] == commands[1] == commands[2]
