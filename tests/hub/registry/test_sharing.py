"""Sharing: another tenant's task by name, read-only, for as long as its owner says."""

import base64

from tests.support.hub_app import OCTETS
from tests.support.models import png, wait_until

URL = "/v1/tasks/default:flowers"


def share(hub, **body):
    answer = hub.http.put("/v1/tasks/flowers/sharing", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_a_shared_task_is_seen_and_used_and_not_changed(hub, adapters) -> None:
    hub.http.post("/v1/tasks/flowers/versions", content=adapters[0].data, headers=OCTETS)
    friend, stranger = hub.key_of("friend"), hub.key_of("stranger")
    own = hub.http.post("/v1/tasks/flowers/classify", content=png()).json()
    assert share(hub, tenants=["friend"])["sharing"] == {"public": False, "tenants": ["friend"]}

    answer = hub.http.post(f"{URL}/classify", content=png(), headers=friend).json()
    assert answer == own | {"task": "default:flowers"}
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
        body = {"json": {"version": 1} if "alias" in path else {"public": True}} if method == "PUT" else {}
        assert hub.http.request(method, URL + path, headers=friend, **body).status_code == 404
    # Its use is the friend's, not the owner's.
    wait_until(lambda: hub.http.get("/v1/usage", headers=friend).json()["counted"]["images"] == 2)
    assert hub.http.get("/v1/usage").json()["counted"]["images"] == 1


def test_sharing_with_all_and_its_end(hub, adapters) -> None:
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
    assert hub.http.get(URL, headers=friend).status_code == 404  # a new task of the name is nobody else's


def test_one_s_own_task_by_its_full_name(hub, adapters) -> None:
    hub.http.post("/v1/tasks/default:flowers/versions", content=adapters[0].data, headers=OCTETS)
    assert hub.http.get("/v1/tasks/flowers").json()["task"] == "flowers"
    assert hub.http.post(f"{URL}/classify", content=png()).status_code == 200
    assert hub.http.delete(URL).status_code == 204


def test_who_shares_with_a_name_learns_nothing_of_it(hub, adapters) -> None:
    hub.http.post("/v1/tasks/flowers/versions", content=adapters[0].data, headers=OCTETS)
    hub.key_of("there")
    answers = [share(hub, tenants=[name])["sharing"] for name in ("there", "nobody")]
    assert answers == [{"public": False, "tenants": [name]} for name in ("there", "nobody")]
    assert hub.http.put("/v1/tasks/flowers/sharing", json={"tenants": ["A b"]}).status_code == 422


def test_a_tenant_s_name_used_again_inherits_no_shares(hub, adapters) -> None:
    hub.http.post("/v1/tasks/flowers/versions", content=adapters[0].data, headers=OCTETS)
    friend = hub.key_of("friend")
    share(hub, tenants=["friend", "other"])
    assert hub.http.post(f"{URL}/classify", content=png(), headers=friend).status_code == 200
    hub.http.delete("/v1/tenants/friend", headers=hub.admin)
    again = hub.key_of("friend")
    assert hub.http.post(f"{URL}/classify", content=png(), headers=again).status_code == 404
    assert hub.http.get("/v1/tasks/flowers").json()["sharing"] == {"public": False, "tenants": ["other"]}
