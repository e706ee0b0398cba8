"""Refused adapter files: a tenant's rate at one gateway, and the 429 beyond it."""

import pytest

from hub.admission.quotas import REFUSED_UPLOADS
from hub.admission.refused_uploads import PERIOD_S, RefusedUploads
from hub.errors import LimitReached
from tests.support.hub_app import OCTETS, Hub


def test_tenant_is_refused_until_time_has_passed_when_too_many_files_were_refused() -> None:
    now = [0.0]
    refused = RefusedUploads(lambda: now[0])
    for _ in range(REFUSED_UPLOADS):
        refused.require("a")
        refused.count("a")
    with pytest.raises(LimitReached, match=f"limit of {REFUSED_UPLOADS} refused adapter files per minute") as error:
        refused.require("a")
    assert error.value.errors[0].field == "refused_uploads"
    refused.require("b")
    now[0] += PERIOD_S / REFUSED_UPLOADS
    refused.require("a")
    refused.count("a")
    with pytest.raises(LimitReached):
        refused.require("a")
    now[0] += PERIOD_S
    for _ in range(REFUSED_UPLOADS):
        refused.require("a")
        refused.count("a")


def test_upload_gets_429_when_too_many_files_of_its_tenant_were_refused(hub: Hub) -> None:
    other = hub.key_of("other")
    refused = 0
    while refused < 3 * REFUSED_UPLOADS:
        last = hub.http.post("/v1/tasks/flowers/versions", content=b"no adapter", headers=OCTETS)
        if last.status_code == 429:
            break
        assert last.status_code == 422
        refused += 1
    assert refused >= REFUSED_UPLOADS
    assert last.json()["errors"][0]["field"] == "refused_uploads"
    assert last.headers["retry-after"] == "1"
    sent = hub.http.post("/v1/tasks/flowers/versions", content=b"no adapter", headers=OCTETS | other)
    assert sent.status_code == 422
