"""Clients without a key at a real hub: repeated headers, slow connections, redirects, Ray's pages."""

import httpx
import pytest

from hub.api.security_headers import SINGLE_HEADERS, security_headers
from tests.support.connections import drip_all, raw_reply

from .conftest import AttackedHub

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
LONG_HEAD_S = 10  # limit of both front proxies
UPLOAD = b"POST /v1/tasks/a/classify HTTP/1.1\r\nhost: hub\r\n"


@pytest.fixture(autouse=True)
def own_front(hub: AttackedHub) -> None:
    """nginx has limits and refusals of its own."""
    if hub.has_nginx:
        pytest.skip("clients do not reach the hub's own front proxy")


def reply(hub: AttackedHub, request: bytes) -> tuple[int, bytes]:
    """Return status and head of the reply to these bytes."""
    head, _ = raw_reply(hub.front.url, request, hub.front.tls)
    return int(head[9:12]), head


@pytest.mark.parametrize(
    "start",
    [
        b"GET /",
        b"GET /healthz HTTP/1.1\r\nhost: hub\r\n\r\nGET /",
        UPLOAD + b"content-length: 100000\r\n\r\n",
        UPLOAD + b"authorization: Bearer kh_unknown\r\ntransfer-encoding: chunked\r\n\r\nfffff\r\n",
        b"POST /nowhere HTTP/1.1\r\nhost: hub\r\ncontent-length: 100000\r\n\r\n",
        b"POST /-/healthz HTTP/1.1\r\nhost: hub\r\ncontent-length: 100000\r\n\r\n",
        b"POST /-/routes HTTP/1.1\r\nhost: hub\r\ncontent-length: 100000\r\n\r\n",
    ],
    ids=["head", "second head", "no key", "unknown key", "no path", "health", "routes"],
)
def test_fifty_connections_end_when_they_send_a_byte_now_and_then(hub: AttackedHub, start: bytes) -> None:
    assert drip_all(hub.front.url, start, count=50, seconds=LONG_HEAD_S + 20, tls=hub.front.tls) == 50


@pytest.mark.parametrize("name", SINGLE_HEADERS)
def test_a_header_with_one_value_is_refused_when_it_is_sent_twice(hub: AttackedHub, name: str) -> None:
    values = ("chunked", "chunked") if name == "transfer-encoding" else ("0", "1")
    host = "" if name == "host" else "host: hub\r\n"
    key = "" if name == "authorization" else f"authorization: Bearer {hub.admin_key}\r\n"
    lines = f"{name}: {values[0]}\r\n{name.title()}: {values[1]}\r\n"
    status, head = reply(hub, f"GET /v1/tenants HTTP/1.1\r\n{host}{key}{lines}\r\n".encode())
    assert status == 400, head


def test_no_path_is_redirected(hub: AttackedHub) -> None:
    """Every route with a slash more, and targets that name another host."""
    document = httpx.get(f"{hub.front.url}/openapi.json", verify=hub.front.tls or True).json()
    operations = [(method.upper(), path) for path, item in document["paths"].items() for method in item]
    names = {"{task}": "a", "{tenant}": "a"}
    targets = []
    for method, path in [*operations, ("GET", "/docs"), ("GET", "/openapi.json"), ("GET", "/")]:
        for placeholder, value in names.items():
            path = path.replace(placeholder, value)
        targets += [(method, f"{path}/"), (method, f"/{path}"), (method, f"//evil.example{path}/")]
    others = ["/\\evil.example/", "/%5cevil.example/", "//evil.example", "/..//evil.example", "/.//evil.example/docs/"]
    targets += [("GET", target) for target in (*others, "http://evil.example/v1/tasks/", "http://evil.example/docs/")]
    for method, target in targets:
        status, head = reply(hub, f"{method} {target} HTTP/1.1\r\nhost: evil.example\r\n\r\n".encode())
        assert not 300 <= status < 400, (method, target, head)
        assert b"\nlocation:" not in head.lower()


@pytest.mark.parametrize("path", ["/-/routes", "/-/ROUTES", "/%2d/routes", "/-%2Froutes", "/-/x", "/-/"])
def test_ray_s_pages_are_hidden(hub: AttackedHub, path: str) -> None:
    status, head = reply(hub, f"GET {path} HTTP/1.1\r\nhost: hub\r\n\r\n".encode())
    assert status == 404, head


def test_ray_s_health_has_the_security_headers_of_all_replies(hub: AttackedHub) -> None:
    expected = {f"{name}: {value}".encode() for name, value in security_headers(tls=False).items()}
    for path in ("/-/healthz", "/-/routes", "/healthz", "/nowhere"):
        status, head = reply(hub, f"GET {path} HTTP/1.1\r\nhost: hub\r\n\r\n".encode())
        assert (status == 200) == path.endswith("healthz")
        assert expected <= {line.strip() for line in head.split(b"\r\n")}, (path, head)
