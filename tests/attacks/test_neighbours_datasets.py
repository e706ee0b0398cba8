"""One tenant's power over the event loop and the registry by a dataset with many images and long labels."""

import json

import pytest
from PIL import Image

from tests.support.models import encoded
from tests.support.neighbours import Request, compare, send
from tests.support.zips import zip_of

from .conftest import AttackedHub, Victim

pytestmark = [pytest.mark.slow, pytest.mark.long]
IMAGES = 4000
ATTEMPTS = 3
DATASET = "/v1/tasks/flowers"
JSON = "application/json"


def pixel(number: int) -> bytes:
    """Return a PNG of one pixel, another one for each number."""
    return encoded(Image.new("RGB", (1, 1), (number >> 16 & 255, number >> 8 & 255, number & 255)), "PNG")


def label(number: int) -> str:
    """Return a label as long as the hub allows."""
    return f"{number:05}".ljust(200, "\u00e9")


@pytest.fixture(scope="module")
def owner(hub: AttackedHub) -> str:
    """Return the key of a tenant with a dataset of small images, two of each label, and as many training jobs as it may
    have."""
    key = hub.tenant({"images_per_second": 1e6})
    files = {f"{label(number % (IMAGES // 2))}/{number}.png": pixel(number) for number in range(IMAGES)}
    assert send(hub.front, Request("PUT", DATASET, key, b"{}", JSON)).status == 201
    reply = send(hub.front, Request("POST", f"{DATASET}/images", key, zip_of(files), "application/zip"))
    assert json.loads(reply.body)["counts"]["added"] == IMAGES
    return key


def training(key: str) -> Request:
    """Return the request for a job."""
    return Request("POST", f"{DATASET}/trainings", key, b'{"recipe": "auto"}', JSON)


ATTACKS = {
    "labels": lambda key: Request("GET", f"{DATASET}/dataset", key),
    "pages": lambda key: Request("GET", f"{DATASET}/images?count=1000", key),
    "trainings": training,
}


@pytest.mark.parametrize("kind", ATTACKS)
def test_victim_is_served_when_another_tenant_reads_a_large_dataset_all_the_time(
    hub: AttackedHub, victim: Victim, owner: str, kind: str
) -> None:
    attack = ATTACKS[kind](owner)
    best = 1000.0
    for _ in range(ATTEMPTS):
        found = compare(hub.front, {"classify": victim.classify}, [attack], at_once=8)["classify"]
        print(f"{kind}: {found.slower:.1f} times; {found}")
        assert not found.beside.failed
        assert found.replies.keys() <= {200, 202, 429}  # without turns the registry did not answer in time
        best = min(best, found.slower)
        if best <= hub.most_slower:
            break
    assert best <= hub.most_slower
