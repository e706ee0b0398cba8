"""Proxies between client and hub: the environment's variables, a proxy's own errors, and redirects."""

import ssl
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from hub import Client
from hub.client.proxies import is_excluded, proxy_for
from hub.errors import HubError, InvalidRequest, Unavailable
from hub.local.ports import free_port
from tests.support.clients import KINDS, Answer, server

Kind = Callable[..., Any]
VARIABLES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR")
TASKS: Answer = (200, {}, b'{"tasks":[]}')
PAGE = b"<html><style>h1 {}</style><h1>Bad\n gateway</h1></html>"


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.fixture(params=KINDS, ids=["sync", "async"])
def kind(request: pytest.FixtureRequest) -> Kind:
    found: Kind = request.param
    return found


@pytest.mark.parametrize("status", [502, 503, 504])
def test_client_tries_again_when_a_proxy_answers_for_the_hub(status: int, kind: Kind) -> None:
    page: Answer = (status, {"content-type": "text/html"}, PAGE)
    with server(page, page, TASKS) as told, kind(told.url, "kh_x") as client:
        assert client.tasks().tasks == []
        assert len(told.paths) == 3


@pytest.mark.parametrize("status", [502, 504])
def test_client_raises_unavailable_when_a_proxy_goes_on_answering_for_the_hub(status: int, kind: Kind) -> None:
    with server((status, {}, PAGE)) as told, kind(told.url, "kh_x", retry_s=0) as client:
        with pytest.raises(Unavailable, match=rf"^HTTP {status} .*, not from a hub: 'Bad gateway'$"):
            client.tasks()
        with pytest.raises(Unavailable):
            client.create_tenant("a")  # may have been created: not tried again
        assert len(told.paths) == 2


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_client_names_the_new_url_when_a_server_redirects(status: int, kind: Kind) -> None:
    redirect: Answer = (status, {"location": "https://hub.example.org/v1/tasks"}, PAGE)
    with server(redirect) as old, kind(old.url, "kh_x") as client, pytest.raises(HubError) as raised:
        client.tasks()
    assert f"{old.url}/v1/tasks redirects to https://hub.example.org/v1/tasks" in raised.value.detail
    assert "use the URL of the hub itself (HUB_URL)" in raised.value.detail
    assert len(old.paths) == 1


@pytest.mark.parametrize("name", ["HTTP_PROXY", "http_proxy", "ALL_PROXY"])
def test_client_calls_through_the_proxy_that_a_variable_names(
    name: str, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    with server(TASKS) as proxy:
        monkeypatch.setenv(name, proxy.url.removeprefix("http://"))  # without a scheme, as curl takes it
        with kind("http://hub.example.org", "kh_x") as client:
            assert client.tasks().tasks == []
    assert proxy.paths == ["http://hub.example.org/v1/tasks"]


@pytest.mark.parametrize(
    "no_proxy", ["localhost,127.0.0.1,::1,fd00::/8", "localhost,[::1],127.0.0.0/8", "*", ".1, 127.0.0.1"]
)
def test_client_uses_no_proxy_when_no_proxy_excludes_the_hub(
    no_proxy: str, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", no_proxy)
    for scheme in ("http", "socks", "socks5", "gopher"):
        monkeypatch.setenv("ALL_PROXY", f"{scheme}://127.0.0.1:9")
        with server(TASKS) as told, kind(told.url, "kh_x") as client:
            assert client.tasks().tasks == []


@pytest.mark.parametrize("scheme", ["socks", "socks5"])
def test_client_names_the_package_when_a_socks_proxy_needs_it(
    scheme: str, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`socksio` is not among the tests' packages."""
    monkeypatch.setenv("ALL_PROXY", f"{scheme}://me:secret@127.0.0.1:1080")
    with pytest.raises(InvalidRequest) as raised:
        kind("http://hub.example.org", "kh_x")
    assert "socks5://127.0.0.1:1080 (ALL_PROXY) needs a package: pip install 'httpx[socks]'" in raised.value.detail
    assert "secret" not in raised.value.detail


@pytest.mark.parametrize("value", ["gopher://127.0.0.1:70", "http://", "http://[::1", "http://h:port"])
def test_client_names_the_variable_when_it_is_not_a_proxy(
    value: str, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", value)
    with pytest.raises(InvalidRequest, match=r"^HTTP_PROXY .*orrect or unset the variable"):
        kind("http://hub.example.org", "kh_x")


def test_client_names_the_proxy_when_it_does_not_answer(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    monkeypatch.setenv("HTTP_PROXY", f"http://me:secret@127.0.0.1:{port}")
    with kind("http://hub.example.org", "kh_x", retry_s=0) as client, pytest.raises(Unavailable) as raised:
        client.tasks()
    proxy = f"http://127.0.0.1:{port} (HTTP_PROXY)"
    assert raised.value.detail.startswith(f"no hub answers at http://hub.example.org through the proxy {proxy}: ")
    assert raised.value.detail.endswith(
        "; unset HTTP_PROXY, or add the hub's host to NO_PROXY, if the hub needs no proxy"
    )


def test_client_names_the_variable_when_the_file_of_certificates_is_missing(
    kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", "/nonexistent/ca.pem")
    with pytest.raises(InvalidRequest, match=r"SSL_CERT_FILE or SSL_CERT_DIR\) cannot be read: .*unset the variable"):
        kind("https://hub.example.org", "kh_x")
    with server(TASKS) as told, kind(told.url, "kh_x") as client:  # http needs no certificates
        assert client.tasks().tasks == []
    Client("https://hub.example.org", "kh_x", tls=ssl.create_default_context()).close()


@pytest.mark.parametrize(
    ("host", "no_proxy", "excluded"),
    [
        ("hub.example.org", "example.org", True),
        ("hub.example.org", ".example.org", True),
        ("hub.example.org", "*.example.org", True),
        ("hub.example.org", "HUB.example.ORG", True),
        ("hubexample.org", "example.org", False),
        ("example.org", "hub.example.org", False),
        ("127.0.0.1", "127.0.0.0/8", True),
        ("127.0.0.1", "10.0.0.0/8, ::1", False),
        ("::1", "::1", True),
        ("::1", "[::1]", True),
        ("fd00::7", "fd00::/8", True),
        ("fe80::7", "fd00::/8,,", False),
        ("hub", "", False),
        ("hub", "*", True),
    ],
)
def test_no_proxy_excludes_names_domains_addresses_and_networks(host: str, no_proxy: str, excluded: bool) -> None:
    assert is_excluded(host, no_proxy) is excluded


def test_proxy_is_that_of_the_url_s_scheme(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://a:1")
    monkeypatch.setenv("HTTPS_PROXY", "http://b:2")
    monkeypatch.setenv("ALL_PROXY", "http://c:3")
    assert str(proxy_for(httpx.URL("https://hub"))) == "http://b:2 (HTTPS_PROXY)"
    assert str(proxy_for(httpx.URL("http://hub"))) == "http://a:1 (HTTP_PROXY)"
    monkeypatch.delenv("HTTP_PROXY")
    assert str(proxy_for(httpx.URL("http://hub"))) == "http://c:3 (ALL_PROXY)"
