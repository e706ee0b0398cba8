"""Names and labels: control characters and long labels are refused, with the name of the field."""

import json

import pytest

from adapters import Adapter, Backbone
from tests.support.hub_app import OCTETS, Hub
from tests.support.models import random_adapter, with_metadata

CHARACTERS = ["\x00", "\n", "\x1b", "\x7f", "\x9b", "\u2028", "\u202e", "\u2066"]


def found(character: str) -> str:
    """Return the text of an error about a character."""
    return f"the control character U+{ord(character):04X}"


@pytest.mark.parametrize("character", CHARACTERS)
def test_name_of_a_key_is_refused_when_it_has_a_control_character(hub: Hub, character: str) -> None:
    for path, headers in (("/v1/tenants/default/keys", {}), ("/v1/admin/keys", hub.admin)):
        reply = hub.http.post(path, json={"name": f"a{character}b"}, headers=headers)
        assert reply.status_code == 422
        assert reply.json()["errors"] == [{"field": "name", "message": f"has {found(character)}; remove it"}]
    assert hub.http.post("/v1/tenants/default/keys", json={"name": "Kamera 7, Süd 🐈"}).status_code == 201


def test_source_is_refused_when_it_has_a_control_character(hub: Hub) -> None:
    reply = hub.http.post("/v1/tasks/a/versions", json={"source": "s3://x/\x1b[2J"})
    assert reply.status_code == 422
    assert reply.json()["errors"][0]["field"] == "source"


@pytest.mark.parametrize("character", CHARACTERS)
def test_adapter_is_refused_when_a_text_of_it_has_a_control_character(
    hub: Hub, adapters: list[Adapter], character: str
) -> None:
    text, config = f"a{character}b", adapters[0].config.model_dump(mode="json")
    config = {name: value for name, value in config.items() if value not in (None, False, ())}
    labels = [text, *adapters[0].labels[1:]]
    changes = {
        "labels": json.dumps(labels),
        "backbone": text,
        "metrics": json.dumps({"notes": [{"by": text}]}),
        "producer": text,
    }
    for field, value in changes.items():
        data = with_metadata(adapters[0], **{field: value})
        Adapter.read(data)  # the file format allows it
        reply = hub.http.post("/v1/tasks/a/versions", content=data, headers=OCTETS)
        assert reply.status_code == 422
        (problem,) = reply.json()["errors"]
        assert problem["field"] == field
        assert found(character) in problem["message"]
    data = with_metadata(adapters[0], metrics=json.dumps({text: 1}))
    reply = hub.http.post("/v1/tasks/a/versions", content=data, headers=OCTETS)
    assert reply.json()["errors"][0]["message"].startswith("a key of metrics has ")


def test_adapter_is_refused_when_a_label_has_more_than_200_characters(hub: Hub, backbone: Backbone) -> None:
    longest = random_adapter(backbone, classes=2, labels=["é" * 200, "b"])
    assert hub.http.post("/v1/tasks/a/versions", content=longest.data, headers=OCTETS).status_code == 201
    longer = random_adapter(backbone, classes=2, labels=["a", "b" * 201])
    reply = hub.http.post("/v1/tasks/b/versions", content=longer.data, headers=OCTETS)
    assert reply.status_code == 422
    message = "label 1 has 201 characters; the limit is 200; shorten them"
    assert reply.json()["errors"] == [{"field": "labels", "message": message}]


def test_error_names_the_first_labels_when_all_are_wrong(hub: Hub, backbone: Backbone) -> None:
    many = random_adapter(backbone, classes=100, labels=[f"{i}\x1b" * 100 for i in range(100)])
    reply = hub.http.post("/v1/tasks/b/versions", content=many.data, headers=OCTETS)
    assert reply.status_code == 422
    assert len(reply.content) < 2000
    assert "95 more labels" in reply.text
