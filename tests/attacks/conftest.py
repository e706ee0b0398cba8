"""One hub that the tests of attacks share, with a victim and tenants that attack.

`make faults` runs the same tests with each of the other set-ups.
"""

import itertools
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from adapters import load_backbone
from hub.admin_schemas import LimitsChange
from hub.client.client import Client
from hub.local.ports import free_port
from tests.support.hub_process import serve
from tests.support.models import png, random_adapter
from tests.support.neighbours import MOST_SLOWER, Front, Request
from tests.support.nginx import CERTIFICATE, deployed_site, nginx
from tests.support.tls import certificate

TASK = "secret"
HOST = "localhost"  # of the certificate
TWO = {"HUB_MIN_GATEWAYS": "2", "HUB_MAX_GATEWAYS": "2", "HUB_MIN_WORKERS": "2", "HUB_MAX_WORKERS": "2"}
BEHIND_NGINX = {"HUB_TRUSTED_PROXIES": '["127.0.0.1/32"]'}  # docs/operate.md
# Settings, whether the hub itself speaks TLS, and the largest ratio of 95th percentiles. Two gateways allow an attacker
# twice as much on the same cores, and Ray's stock proxy reads whole bodies before a gateway can pause them: 4.9 and 7.5
# at most.
SETUPS = [
    pytest.param(({}, False, MOST_SLOWER), id="haproxy"),
    pytest.param((TWO, True, 2 * MOST_SLOWER), id="haproxy-tls-two", marks=pytest.mark.long),
    pytest.param((TWO | {"HUB_HAPROXY": "false"}, True, 2 * MOST_SLOWER), id="stock-tls-two", marks=pytest.mark.long),
    pytest.param((TWO | BEHIND_NGINX, False, 2 * MOST_SLOWER), id="nginx-tls-two", marks=pytest.mark.long),
]


@dataclass(frozen=True)
class AttackedHub:
    """A hub with the default limits, its front proxy, its admin key and its home.

    Attributes:
        most_slower: largest ratio of 95th percentiles that the best of several comparisons may have.
        has_haproxy: whether clients connect to HAProxy.
        has_nginx: whether they connect to nginx with TLS, in front of HAProxy.
    """

    front: Front
    admin_key: str
    home: Path
    most_slower: float
    has_haproxy: bool
    has_nginx: bool
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def client(self, key: str) -> Client:
        """Return a client with this key."""
        return Client(self.front.url, key, tls=self.front.tls)

    def tenant(self, limits: Mapping[str, float] | None = None) -> str:
        """Create a tenant with a new name; return the key of its owner."""
        name = f"tenant-{next(self._numbers)}"
        with self.client(self.admin_key) as admin:
            admin.create_tenant(name, LimitsChange.model_validate(limits or {}))
            return admin.create_key(name, "owner", role="owner").key


@dataclass(frozen=True)
class Victim:
    """A tenant with one task."""

    key: str
    adapter: bytes
    classify: Request


@pytest.fixture(scope="session", params=SETUPS)
def hub(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[AttackedHub]:
    """Start the hub as a user does."""
    settings, tls, most_slower = request.param
    folder = tmp_path_factory.mktemp("attacked")
    home, cert = folder / "home", folder / "cert.pem"
    home.mkdir(0o700)
    if tls:
        key, public = certificate(HOST)
        cert.write_bytes(public)
        (folder / "key.pem").write_bytes(key)
        settings = settings | {"HUB_TLS_CERT": str(cert), "HUB_TLS_KEY": str(folder / "key.pem")}
    port = free_port()
    served = serve(home, port, **settings)
    assert served.admin_key is not None
    has_nginx = settings.items() >= BEHIND_NGINX.items()
    has_haproxy = settings.get("HUB_HAPROXY") != "false" and not has_nginx
    with ExitStack() as proxies:
        front = Front(f"https://{HOST}:{port}", cert) if tls else Front(served.url)
        if has_nginx:
            url = f"https://{HOST}:{free_port()}"
            proxies.enter_context(nginx(folder, deployed_site(folder, url, port), url))
            front = Front(url, folder / CERTIFICATE)
        yield AttackedHub(front, served.admin_key, home, most_slower, has_haproxy, has_nginx)
    served.stop()


@pytest.fixture(scope="session")
def victim(hub: AttackedHub) -> Victim:
    """Create a tenant, register its task, and classify until the batch size is learned."""
    key, adapter = hub.tenant(), random_adapter(load_backbone("demo"), seed=1).data
    with hub.client(key) as client:
        client.register(TASK, adapter)
        for _ in range(50):
            client.classify(TASK, [png()])
    return Victim(key, adapter, Request("POST", f"/v1/tasks/{TASK}/classify", key, png(), "image/png"))
