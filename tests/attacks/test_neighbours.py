"""One tenant's power over another tenant: each attack beside a victim's calls, as ratios of the same run."""

import base64

import pytest

from adapters import load_backbone
from hub.schemas import MAX_IMAGES, MAX_REPLY_BYTES
from tests.support.models import flat_png, random_adapter
from tests.support.neighbours import Request, compare

from .conftest import TASK, AttackedHub, Victim

pytestmark = pytest.mark.slow
LARGEST_PROBLEM_BYTES = 16 * 1024


def test_victim_is_served_when_another_tenant_sends_json_of_39_mb_with_a_wrong_text(
    hub: AttackedHub, victim: Victim
) -> None:
    key = hub.tenant()
    body = b'{"images": ["' + b"\xc3\xa9" * 19_500_000 + b'"]}'
    attack = [Request("POST", f"/v1/tasks/{TASK}/classify", key, body, "application/json")]
    found = compare(hub.front, {"classify": victim.classify}, attack, at_once=4)["classify"]
    print(found)
    assert not found.beside.failed
    assert found.largest_reply_bytes < LARGEST_PROBLEM_BYTES


def test_replies_are_small_when_another_tenant_asks_for_all_of_its_long_labels(
    hub: AttackedHub, victim: Victim
) -> None:
    key = hub.tenant()
    with hub.client(key) as client:
        labels = [f"{i:03}".ljust(200, "\U0001f600") for i in range(100)]
        client.register("wide", random_adapter(load_backbone("demo"), classes=100, labels=labels).data)
    texts = ", ".join([f'"{base64.b64encode(flat_png()).decode()}"'] * MAX_IMAGES)
    body = f'{{"images": [{texts}], "top_k": 1000}}'.encode()
    attack = [Request("POST", "/v1/tasks/wide/classify", key, body, "application/json")]
    found = compare(hub.front, {"classify": victim.classify}, attack, at_once=2)["classify"]
    print(found)
    assert not found.beside.failed
    assert found.replies
    assert found.largest_reply_bytes < MAX_REPLY_BYTES
