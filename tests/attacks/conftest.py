"""One hub that the tests of attacks share, with a victim and tenants that attack."""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from adapters import load_backbone
from hub.admin_schemas import LimitsChange
from hub.client.client import Client
from hub.local.ports import free_port
from tests.support.hub_process import serve
from tests.support.models import png, random_adapter
from tests.support.neighbours import Request

TASK = "secret"


@dataclass(frozen=True)
class AttackedHub:
    """A hub with the default limits, its admin key and its home."""

    url: str
    admin_key: str
    home: Path
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def tenant(self, limits: Mapping[str, float] | None = None) -> str:
        """Create a tenant with a new name; return the key of its owner."""
        name = f"tenant-{next(self._numbers)}"
        with Client(self.url, self.admin_key) as admin:
            admin.create_tenant(name, LimitsChange.model_validate(limits or {}))
            return admin.create_key(name, "owner", role="owner").key


@dataclass(frozen=True)
class Victim:
    """A tenant with one task."""

    key: str
    adapter: bytes
    classify: Request


@pytest.fixture(scope="session")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AttackedHub]:
    """Start the hub as a user does."""
    home = tmp_path_factory.mktemp("attacked")
    served = serve(home, free_port())
    assert served.admin_key is not None
    yield AttackedHub(served.url, served.admin_key, home)
    served.stop()


@pytest.fixture(scope="session")
def victim(hub: AttackedHub) -> Victim:
    """Create a tenant, register its task, and classify until the batch size is learned."""
    key, adapter = hub.tenant(), random_adapter(load_backbone("demo"), seed=1).data
    with Client(hub.url, key) as client:
        client.register(TASK, adapter)
        for _ in range(50):
            client.classify(TASK, [png()])
    return Victim(key, adapter, Request("POST", f"/v1/tasks/{TASK}/classify", key, png(), "image/png"))
