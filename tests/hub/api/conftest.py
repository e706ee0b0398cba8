"""A hub with one task, `flowers`, and its address for clients of other protocols."""

from collections.abc import Iterator

import pytest

from adapters import Adapter, Backbone
from tests.support.asgi import listening
from tests.support.hub_app import OCTETS, Hub
from tests.support.models import calibrated_adapter


@pytest.fixture
def flowers(hub: Hub, adapters: list[Adapter]) -> Hub:
    """A hub with a task `flowers`: version 1 is `stable`, version 2 is `latest`."""
    for adapter, params in ((adapters[0], {"alias": "stable"}), (adapters[1], {})):
        reply = hub.http.post("/v1/tasks/flowers/versions", content=adapter.data, params=params, headers=OCTETS)
        assert reply.status_code == 201, reply.text
    return hub


@pytest.fixture(scope="module")
def adapter(backbone: Backbone) -> Adapter:
    """A head for images of noise."""
    return calibrated_adapter(backbone)


@pytest.fixture
def served(hub: Hub, adapter: Adapter) -> Hub:
    """A hub with a task `flowers` of one version, whose images are noise, and which keeps no images."""
    reply = hub.http.post("/v1/tasks/flowers/versions", content=adapter.data, headers=OCTETS)
    assert reply.status_code == 201, reply.text
    return hub


@pytest.fixture
def address(flowers: Hub) -> Iterator[str]:
    """Host and port of a second gateway of `flowers`."""
    with listening(flowers.another_gateway().app) as url:
        yield url.removeprefix("http://")
