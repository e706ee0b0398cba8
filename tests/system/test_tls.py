"""A hub that listens on the network with TLS at HAProxy."""

import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from hub.local.ports import free_port
from tests.support.hub_process import GATEWAY_PORTS, Served, descendants, environment_of, listening_sockets, serve

from .conftest import HOST

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, pems: tuple[Path, Path]) -> Iterator[Served]:
    settings = {"HUB_TLS_CERT": str(pems[0]), "HUB_TLS_KEY": str(pems[1]), "HUB_HOST": "0.0.0.0"}
    hub = serve(tmp_path_factory.mktemp("home"), free_port(), **settings)
    yield hub
    hub.stop()


def port_of(hub: Served) -> int:
    port = httpx.URL(hub.url).port
    assert port is not None
    return port


def client(hub: Served, tls: ssl.SSLContext, host: str = HOST) -> httpx.Client:
    return httpx.Client(base_url=f"https://{host}:{port_of(hub)}", verify=tls, timeout=60)


def test_hub_with_a_certificate_speaks_tls_1_2_or_later_only(served: Served, tls: ssl.SSLContext) -> None:
    assert served.url.startswith("https://")
    with client(served, tls) as http:
        answer = http.get("/healthz")
        assert (answer.status_code, answer.json()) == (200, {"status": "ok"})
        assert answer.headers["strict-transport-security"].startswith("max-age=")
        assert "server" not in answer.headers
    with pytest.raises(httpx.HTTPError):
        httpx.get(f"http://{HOST}:{port_of(served)}/healthz")
    with pytest.raises(httpx.ConnectError, match="certificate"):
        httpx.get(f"https://{HOST}:{port_of(served)}/healthz")
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
    old.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        old.maximum_version = ssl.TLSVersion.TLSv1_1
    with socket.create_connection((HOST, port_of(served))) as raw, pytest.raises(ssl.SSLError):
        old.wrap_socket(raw)


def test_only_haproxys_front_listens_on_the_network(served: Served) -> None:
    """Ray's own ports need its token; docs/security.md."""
    everything = descendants(served.process.pid)
    proxies = [pid for pid in everything if Path(f"/proc/{pid}/comm").read_text() == "haproxy\n"]
    assert proxies
    assert {port: address for address, port in listening_sockets(proxies)} == {port_of(served): "0.0.0.0"}
    gateways = {port: address for address, port in listening_sockets(everything) if port in GATEWAY_PORTS}
    assert gateways
    assert {*gateways.values()} == {"127.0.0.1"}


def test_private_files_of_the_hub_are_readable_by_its_user_only(served: Served) -> None:
    environments = [environment_of(pid) for pid in descendants(served.process.pid)]
    [token] = {Path(e["RAY_AUTH_TOKEN_PATH"]) for e in environments if "RAY_AUTH_TOKEN_PATH" in e}
    secrets = [token, *token.parent.glob("*.pem")]
    assert len(secrets) > 1
    assert [path.stat().st_mode & 0o077 for path in (token.parent, *secrets)] == [0] * (len(secrets) + 1)


def test_audit_has_the_address_of_the_connection_and_not_a_forwarded_one(served: Served, tls: ssl.SSLContext) -> None:
    address = own_address()
    forwarded = {"x-forwarded-for": "203.0.113.9", "forwarded": "for=203.0.113.9", "x-real-ip": "203.0.113.9"}
    admin = {"authorization": f"Bearer {served.admin_key}"}
    [ca] = tls.get_ca_certs(binary_form=True)
    unnamed = ssl.create_default_context(cadata=ssl.DER_cert_to_PEM_cert(ca))
    unnamed.check_hostname = False  # the certificate is for a name
    with client(served, unnamed, address) as http:
        http.post("/v1/tenants", json={"tenant": "a"}, headers=admin | forwarded).raise_for_status()
        entries = http.get("/v1/audit", params={"count": 1000}, headers=admin).json()["entries"]
    assert [e["address"] for e in entries if (e["action"], e["tenant"]) == ("tenant.create", "a")] == [address]


def own_address() -> str:
    """Return this machine's address in its network, or the loopback address without a network."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing
        except OSError:
            return "127.0.0.1"
        address: str = probe.getsockname()[0]
        return address
