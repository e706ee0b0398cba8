"""Keys that are bound to tasks or web origins, and tokens that stand in for a key."""

import base64
import json
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters import Adapter
from hub.admission.tokens import Token, is_signed, read, sign
from hub.registry.keys import hash_key, key_id
from tests.support.hub_app import OCTETS, Hub, bearer
from tests.support.models import png

PAGE = "https://app.example.org"
HASH = hash_key("kh_a")


@pytest.fixture(autouse=True)
def tasks(hub: Hub, adapters: Sequence[Adapter]) -> None:
    for name, adapter in zip(("flowers", "trees"), adapters, strict=False):
        hub.http.post(f"/v1/tasks/{name}/versions", content=adapter.data, headers=OCTETS)


def bound(hub: Hub, **bounds: object) -> dict[str, str]:
    """Return the header of a caller's key of tenant `default` with these bounds."""
    made = hub.http.post("/v1/tenants/default/keys", json={"name": "page", **bounds})
    assert made.status_code == 201, made.text
    for name, value in bounds.items():
        assert made.json()[name] == value
    return bearer(made.json()["key"])


def status(hub: Hub, task: str, headers: dict[str, str]) -> int:
    return hub.http.post(f"/v1/tasks/{task}/classify", content=png(), headers=headers).status_code


def test_key_bound_to_a_task_reaches_no_other_task_by_any_route(hub: Hub) -> None:
    key = bound(hub, tasks=["flowers"])
    image = base64.b64encode(png()).decode()
    assert status(hub, "flowers", key) == status(hub, "default:flowers", key) == 200
    assert [t["task"] for t in hub.http.get("/v1/tasks", headers=key).json()["tasks"]] == ["flowers"]
    refused = [
        hub.http.post("/v1/tasks/trees/classify", content=png(), headers=key),
        hub.http.post("/v1/tasks/nothing/classify", content=png(), headers=key),
        hub.http.post("/v1/classify", json={"inputs": [{"task": "trees", "image": image}]}, headers=key),
        hub.http.get("/v1/tasks/trees", headers=key),
        hub.http.get("/v1/tasks/trees/versions/latest", headers=key),
        hub.http.post("/models/trees", content=png(), headers=key),
        hub.http.get("/v2/models/trees", headers=key),
        hub.http.get("/v1/usage", headers=key),
        hub.http.post("/v1/tokens", json={"task": "trees"}, headers=key),
    ]
    assert [answer.status_code for answer in refused] == [403] * len(refused)
    assert refused[0].json()["detail"] == "This key may use only flowers. Use another key for task 'trees'."


def test_key_bound_to_an_origin_works_only_on_its_pages(hub: Hub) -> None:
    key = bound(hub, origins=[PAGE])
    assert status(hub, "flowers", key | {"origin": PAGE}) == 200
    for headers in (key, key | {"origin": "https://evil.example"}, key | {"origin": "null"}):
        answer = hub.http.post("/v1/tasks/flowers/classify", content=png(), headers=headers)
        assert answer.status_code == 403
        assert answer.json()["detail"] == f"This key works only on pages of {PAGE}."
    assert status(hub, "flowers", bearer(hub.key) | {"origin": "https://evil.example"}) == 200


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"origins": ["https://app.example.org/"]}, "origins.0"),
        ({"origins": ["HTTPS://app.example.org"]}, "origins.0"),
        ({"origins": ["*"]}, "origins.0"),
        ({"origins": []}, "origins"),
        ({"tasks": []}, "tasks"),
        ({"tasks": ["No Task"]}, "tasks.0"),
        ({"tasks": ["flowers"], "role": "owner"}, "body"),
    ],
)
def test_bounds_that_could_never_hold_are_refused_by_name(hub: Hub, body: dict[str, object], field: str) -> None:
    answer = hub.http.post("/v1/tenants/default/keys", json={"name": "page", **body})
    assert answer.status_code == 422
    assert [problem["field"] for problem in answer.json()["errors"]] == [field]


def token(hub: Hub, headers: dict[str, str] | None = None, **body: object) -> dict[str, str]:
    made = hub.http.post("/v1/tokens", json={"task": "flowers", **body}, headers=headers)
    assert made.status_code == 201, made.text
    return bearer(made.json()["token"])


def test_token_may_only_classify_with_its_task_and_ends_with_its_key(hub: Hub) -> None:
    owner = hub.http.post("/v1/tenants/default/keys", json={"name": "app", "role": "owner"}).json()
    held = token(hub, bearer(owner["key"]))
    assert status(hub, "flowers", held) == 200
    assert status(hub, "trees", held) == 403
    assert hub.http.delete("/v1/tasks/flowers", headers=held).status_code == 403
    assert hub.http.get("/v1/tenants/default/keys", headers=held).status_code == 403
    again = hub.http.post("/v1/tokens", json={"task": "flowers"}, headers=held)
    assert (again.status_code, again.json()["detail"]) == (403, "A token cannot create tokens. Use its key.")
    hub.http.delete(f"/v1/tenants/default/keys/{owner['id']}")
    assert status(hub, "flowers", held) == 401


def test_token_expires_within_the_hour_and_not_after_its_key(hub: Hub) -> None:
    now_s = time.time()
    made = hub.http.post("/v1/tokens", json={"task": "flowers", "expires_s": 60}).json()
    assert now_s + 55 < datetime.fromisoformat(made["expires"]).timestamp() < now_s + 120
    soon = (datetime.now(UTC) + timedelta(seconds=30)).isoformat()
    key = hub.http.post("/v1/tenants/default/keys", json={"name": "short", "expires": soon}).json()
    made = hub.http.post("/v1/tokens", json={"task": "flowers"}, headers=bearer(key["key"])).json()
    assert datetime.fromisoformat(made["expires"]).timestamp() <= now_s + 60
    old = sign(Token(key_id(hub.key), "flowers", int(now_s) - 1), hash_key(hub.key))
    answer = hub.http.post("/v1/tasks/flowers/classify", content=png(), headers=bearer(old))
    assert (answer.status_code, answer.json()["detail"]) == (401, "The token is expired. Create a new token.")
    assert hub.http.post("/v1/tokens", json={"task": "flowers", "expires_s": 3601}).status_code == 422
    assert hub.http.post("/v1/tokens", json={"task": "nothing"}).status_code == 404


def test_token_of_a_key_with_origins_keeps_to_them(hub: Hub) -> None:
    key = bound(hub, origins=[PAGE, "http://localhost:3000"]) | {"origin": PAGE}
    held = token(hub, key)
    assert status(hub, "flowers", held) == 403
    assert status(hub, "flowers", held | {"origin": "http://localhost:3000"}) == 200
    assert status(hub, "flowers", token(hub, key, origins=[PAGE]) | {"origin": "http://localhost:3000"}) == 403
    other = hub.http.post("/v1/tokens", json={"task": "flowers", "origins": ["https://b.example"]}, headers=key)
    assert other.status_code == 403


def test_changed_token_is_refused(hub: Hub) -> None:
    held = hub.http.post("/v1/tokens", json={"task": "flowers"}).json()["token"]
    payload, signature = held.removeprefix("kt_").split(".")
    fields = json.loads(base64.urlsafe_b64decode(payload + "=="))
    fields[1] = "trees"
    forged = base64.urlsafe_b64encode(json.dumps(fields, separators=(",", ":")).encode()).decode().rstrip("=")
    for text in (f"kt_{forged}.{signature}", f"kt_{payload}.", f"kt_{payload}", "kt_", held[:-2], held + "x", "kt_é"):
        headers = [(b"authorization", b"Bearer " + text.encode())]
        answer = hub.http.post("/v1/tasks/trees/classify", content=png(), headers=headers)
        assert answer.status_code == 401, text


@given(st.text(max_size=60))
def test_any_text_is_read_without_an_error_and_has_no_signature(text: str) -> None:
    read(f"kt_{text}")
    assert not is_signed(f"kt_{text}", HASH)


@pytest.mark.parametrize(
    "payload", ["1", "[]", "[1,2,3]", '["a","b",true]', '["a","b",1.5]', '["a","b",1,2]', "[" * 2000]
)
def test_payload_of_another_shape_is_no_token(payload: str) -> None:
    assert read("kt_" + base64.urlsafe_b64encode(payload.encode()).decode()) is None


def test_signed_token_is_read_back() -> None:
    for origins in ((), (PAGE, "http://[::1]:80")):
        made = Token("0" * 16, "other:flowers", 1_900_000_000, origins)
        text = sign(made, HASH)
        assert read(text) == made
        assert is_signed(text, HASH)
        assert not is_signed(text, hash_key("kh_b"))
