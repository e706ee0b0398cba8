"""One tenant's power over a gateway's threads: large JSON, files that are slow to check, and large images."""

import base64
import io
import itertools
import json
import math
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from PIL import Image

from adapters import Adapter
from hub.admission.quotas import REFUSED_UPLOADS
from tests.support.models import png, with_tensors
from tests.support.neighbours import Request, compare, send

from .conftest import TASK, AttackedHub, Victim

pytestmark = pytest.mark.slow
AT_ONCE = 48
ATTEMPTS = 3
OCTETS = "application/octet-stream"
JSON = "application/json"


def assert_served(hub: AttackedHub, victims: Mapping[str, Request], attack: Request) -> None:
    """Check that each victim's best comparison of at most `ATTEMPTS` is within the bound.

    Other processes of the machine make a comparison worse, and hardly ever better.
    """
    best = dict.fromkeys(victims, math.inf)
    for attempt in range(ATTEMPTS):
        for name, found in compare(hub.front, victims, [attack], at_once=AT_ONCE).items():
            print(f"{name}, attempt {attempt}: {found.slower:.1f} times; {found}")
            assert not found.beside.failed
            best[name] = min(best[name], found.slower)
        if max(best.values()) <= hub.most_slower:
            return
    pytest.fail(f"times as long as alone, the best of {ATTEMPTS} comparisons: {best}; limit {hub.most_slower}")


def in_json(victim: Victim) -> Request:
    """Return the victim's call with its image as base64 text."""
    body = json.dumps({"images": [base64.b64encode(png()).decode()]}).encode()
    return Request("POST", f"/v1/tasks/{TASK}/classify", victim.key, body, JSON)


def numbers_in_json() -> bytes:
    """Return a call of the Open Inference Protocol with a million numbers, 4 MB."""
    tensor = {"name": "pixels", "shape": [300, 3, 32, 32], "datatype": "UINT8", "data": [200] * (300 * 3 * 32 * 32)}
    return json.dumps({"inputs": [tensor]}).encode()


def texts_in_json() -> bytes:
    """Return a call with 4 MB of base64 text."""
    return json.dumps({"images": ["A" * 62_500] * 64}).encode()


def members_in_json() -> bytes:
    """Return a call with as many unknown members as fit in 4 MB."""
    return json.dumps({"inputs": [{str(i): 1 for i in range(300_000)}]}).encode()


BODIES = {
    "numbers": ("/v2/models/{task}/infer", numbers_in_json),
    "texts": ("/v1/tasks/{task}/classify", texts_in_json),
    "members": ("/v2/models/{task}/infer", members_in_json),
}


@pytest.mark.parametrize("kind", BODIES)
def test_victim_is_served_when_another_tenant_sends_48_calls_of_4_mb_of_json_at_once(
    hub: AttackedHub, victim: Victim, kind: str
) -> None:
    path, body = BODIES[kind]
    key = hub.tenant()
    attack = Request("POST", path.format(task="theirs"), key, body(), JSON)
    assert_served(hub, {"json": in_json(victim), "classify": victim.classify}, attack)


def slow_file(victim: Victim) -> bytes:
    """Return a file of 895 KB with 9,990 tensors of layers that no backbone has."""
    tensors = {f"blocks.{i}.attn.qkv.scale": torch.ones(1) for i in range(9_990)}
    return with_tensors(Adapter.read(victim.adapter), tensors)


def test_victim_s_uploads_and_calls_are_served_when_another_tenant_uploads_48_slow_files_at_once(
    hub: AttackedHub, victim: Victim
) -> None:
    key = hub.tenant()
    attack = Request("POST", "/v1/tasks/theirs/versions", key, slow_file(victim), OCTETS)
    upload = Request("POST", f"/v1/tasks/{TASK}/versions", victim.key, victim.adapter, OCTETS)
    assert_served(hub, {"upload": upload, "classify": victim.classify}, attack)


def test_tenant_gets_429_when_too_many_of_its_files_are_refused(hub: AttackedHub, victim: Victim) -> None:
    key = hub.tenant()
    refused = Request("POST", "/v1/tasks/theirs/versions", key, b"not an adapter", OCTETS)
    for reply in (send(hub.front, refused) for _ in itertools.repeat(None, 3 * REFUSED_UPLOADS)):
        if reply.status == 429:
            break
        assert reply.status == 422
    assert json.loads(reply.body)["errors"][0]["field"] == "refused_uploads"
    assert 1 <= int(reply.headers["retry-after"]) <= 60
    own = Request("POST", f"/v1/tasks/{TASK}/versions", victim.key, victim.adapter, OCTETS)
    assert send(hub.front, own).status == 200


def large_image(kind: str) -> bytes:
    """Return an image of 49.9 megapixels."""
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8).repeat(110, 0).repeat(110, 1)
    file = io.BytesIO()
    Image.fromarray(pixels[:7040, :7088]).save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_victim_is_served_when_another_tenant_sends_images_of_50_megapixels(
    hub: AttackedHub, victim: Victim, kind: str
) -> None:
    key = hub.tenant()
    registered = Request("POST", "/v1/tasks/theirs/versions", key, victim.adapter, OCTETS)
    assert send(hub.front, registered).status == 201
    attack = Request("POST", "/v1/tasks/theirs/classify", key, large_image(kind), OCTETS)
    assert_served(hub, {"classify": victim.classify}, attack)
