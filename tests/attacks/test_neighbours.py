"""One tenant's power over another tenant: each attack beside a victim's calls, as ratios of the same run."""

import pytest

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
    found = compare(hub.url, {"classify": victim.classify}, attack, at_once=4)["classify"]
    print(found)
    assert not found.beside.failed
    assert found.largest_reply_bytes < LARGEST_PROBLEM_BYTES
