"""Security headers of replies, and CORS."""

import pytest
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.testclient import TestClient

from hub.api.app import GatewayAPI
from hub.api.dependencies import client_address
from hub.api.security_headers import DATA_POLICY, PAGE_POLICY
from hub.concurrency import ActiveTenants
from hub.settings import Settings
from tests.support.hub_app import Hub

ALWAYS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-store",
    "content-security-policy": DATA_POLICY,
}
SITE = "https://a.example"


def client(**settings: object) -> TestClient:
    """Return a client of an application with a route for each kind of reply."""
    api = GatewayAPI(Settings(backbone="demo", **settings), ActiveTenants())  # type: ignore[arg-type]

    @api.get("/")
    async def page() -> Response:
        return HTMLResponse("<p>")

    @api.get("/asset")
    async def asset() -> Response:
        return PlainTextResponse("x", headers={"Cache-Control": "max-age=60"})

    @api.get("/fails")
    async def fails() -> Response:
        raise RuntimeError("unexpected")

    @api.post("/v1/echo")
    async def echo(request: Request) -> int:
        return len(await request.body())

    return TestClient(api, raise_server_exceptions=False)


def test_every_reply_has_security_headers() -> None:
    http = client()
    for reply in (http.post("/v1/echo", content=b"abc"), http.get("/nothing"), http.put("/asset"), http.get("/fails")):
        assert ALWAYS.items() <= dict(reply.headers).items(), reply
        assert "strict-transport-security" not in reply.headers
        assert "access-control-allow-origin" not in reply.headers


def test_a_page_may_load_only_the_hubs_own_scripts() -> None:
    policy = client().get("/").headers["content-security-policy"]
    assert policy == PAGE_POLICY
    assert "script-src 'self';" in policy
    assert "frame-ancestors 'none'" in policy
    assert "http" not in policy


def test_a_header_that_a_route_sets_stays() -> None:
    headers = client().get("/asset").headers
    assert headers.get_list("cache-control") == ["max-age=60"]
    assert headers["x-content-type-options"] == "nosniff"


def test_a_reply_has_hsts_when_the_hub_uses_tls() -> None:
    headers = client(tls_cert="cert.pem", tls_key="key.pem").get("/").headers
    assert headers["strict-transport-security"] == "max-age=31536000"


def test_cors_is_off_when_no_origin_is_set() -> None:
    preflight = {"origin": SITE, "access-control-request-method": "POST"}
    assert "access-control-allow-origin" not in client().options("/v1/echo", headers=preflight).headers


def test_cors_allows_only_the_origins_of_the_settings() -> None:
    http = client(cors_origins=(SITE,))
    preflight = {"origin": SITE, "access-control-request-method": "POST"}
    headers = {**preflight, "access-control-request-headers": "authorization, content-type, x-canary-key"}
    allowed = http.options("/v1/echo", headers=headers)
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == SITE
    assert "access-control-allow-credentials" not in allowed.headers
    assert http.options("/v1/echo", headers=preflight | {"origin": "https://b.example"}).status_code == 400
    assert "access-control-allow-origin" not in http.get("/", headers={"origin": "https://b.example"}).headers


@pytest.mark.parametrize(("method", "path"), [("POST", "/v1/echo"), ("GET", "/fails")])
def test_a_page_of_an_allowed_origin_can_read_replies_and_errors(method: str, path: str) -> None:
    reply = client(cors_origins=(SITE,)).request(method, path, headers={"origin": SITE})
    assert reply.headers["access-control-allow-origin"] == SITE
    assert "retry-after" in reply.headers["access-control-expose-headers"]


@pytest.mark.parametrize(
    ("peer", "address"),
    [
        (("192.0.2.7", 1234), "192.0.2.7"),
        (("::ffff:192.0.2.7", 1), "192.0.2.7"),
        (("2001:DB8::1", 1), "2001:db8::1"),
        (("unknown; drop table", 0), ""),
        (("testclient", 50000), ""),
        (None, ""),
    ],
)
def test_the_client_address_is_the_peers(peer: tuple[str, int] | None, address: str) -> None:
    headers = [(b"x-forwarded-for", b"203.0.113.9"), (b"forwarded", b"for=203.0.113.9"), (b"x-real-ip", b"203.0.113.9")]
    assert client_address(Request({"type": "http", "client": peer, "headers": headers})) == address


def test_every_reply_of_the_hub_has_security_headers(hub: Hub) -> None:
    for method, path in (
        ("GET", "/healthz"),
        ("GET", "/v1/tasks"),
        ("GET", "/v1/tasks/nothing"),
        ("POST", "/v1/classify"),
        ("GET", "/openapi.json"),
        ("GET", "/nowhere"),
        ("DELETE", "/v1/tasks"),
    ):
        assert ALWAYS.items() <= dict(hub.http.request(method, path).headers).items(), path
