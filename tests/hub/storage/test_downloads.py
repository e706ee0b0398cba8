"""Downloads connect only to checked, public addresses; with a real TLS server on loopback."""

import socket
import ssl
import threading
from collections.abc import Iterator, Sequence
from ipaddress import ip_address
from typing import Any

import pytest

from hub.errors import HubError, InvalidRequest, TooLarge, Unavailable
from hub.storage.remote_sources import RemoteSources, is_global
from tests.support.remote_sources import DATA, refusal
from tests.support.tls import certificate


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "100.100.100.200"),
        *("0.0.0.0", "255.255.255.255", "224.0.0.1", "240.0.0.1", "192.0.0.192", "192.0.2.1", "198.18.0.1"),
        *("192.88.99.1", "168.63.129.16", "::", "::1", "fe80::1", "fe80::1%eth0", "fc00::1", "fd00:ec2::254"),
        *("fec0::1", "ff02::1", "ff0e::1", "2001:db8::1", "3fff::1", "5f00::1", "100::1", "2001::1", "2001:10::1"),
        *("::ffff:127.0.0.1", "::ffff:169.254.169.254", "::127.0.0.1", "::8.8.8.8"),
        *("64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::808:808", "2002:7f00:1::", "2002:a9fe:a9fe::1"),
    ],
)
def test_address_is_refused_when_it_is_not_public(address: str) -> None:
    assert not is_global(ip_address(address))


@pytest.mark.parametrize(
    "address",
    ["8.8.8.8", "1.1.1.1", "2606:4700::1111", "2a00:1450::1", "::ffff:8.8.8.8", "64:ff9b::808:808", "2002:808:808::1"],
)
def test_address_is_accepted_when_it_is_public(address: str) -> None:
    assert is_global(ip_address(address))


ANSWERS = {
    "ok": b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(DATA), DATA),
    "chunked": b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(DATA), DATA),
    "short": b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\nabc",
    "gzip": b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: 3\r\n\r\nabc",
    "moved": b"HTTP/1.1 302 Found\r\nlocation: https://adapters.test/ok\r\ncontent-length: 0\r\n\r\n",
    "absent": b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n",
    "partial": b"HTTP/1.1 206 Partial Content\r\ncontent-length: 3\r\n\r\nabc",
    "broken": b"HTTP/1.1 500 Oops\r\ncontent-length: 0\r\n\r\n",
    "noise": b"SSH-2.0-OpenSSH\r\n\r\n",
}
Contexts = tuple[ssl.SSLContext, ssl.SSLContext]
TRICKLES = {  # start, piece that is repeated 300 times, end
    "slow-header": (b"HTTP/1.1 200 OK\r\nx: ", b"x", b"\r\ncontent-length: 0\r\n\r\n"),
    "slow-body": (b"HTTP/1.1 200 OK\r\ncontent-length: 300\r\n\r\n", b"x", b""),
    "large": (b"HTTP/1.1 200 OK\r\n\r\n", bytes(10_000), b""),
}


class Server:
    """TLS server on loopback that answers from `ANSWERS` and records requests."""

    def __init__(self, tls: ssl.SSLContext) -> None:
        self.seen: list[tuple[str | None, bytes]] = []  # (host name in TLS, request)
        self._name: str | None = None
        tls.sni_callback = self._note_name
        self._tls = tls
        self._stop = threading.Event()
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        socket.create_connection(("127.0.0.1", self.port)).close()  # ends `accept`
        self._thread.join()
        self._listening.close()

    def _note_name(self, _socket: ssl.SSLObject, name: str | None, _context: ssl.SSLContext) -> None:
        self._name = name

    def _serve(self) -> None:
        while True:
            plain, _ = self._listening.accept()
            plain.settimeout(10)
            with plain:
                if self._stop.is_set():
                    return
                try:
                    with self._tls.wrap_socket(plain, server_side=True) as connection:
                        self._answer(connection)
                except OSError:
                    continue  # the client closed the connection

    def _answer(self, connection: ssl.SSLSocket) -> None:
        request = b""
        while b"\r\n\r\n" not in request:
            request += connection.recv(4096)
        self.seen.append((self._name, request))
        path = request.split()[1].decode().removeprefix("/v1/")
        begin, piece, end = TRICKLES.get(path, (b"", b"", b""))
        connection.sendall(begin)
        for _ in range(300 if piece else 0):  # complete after three seconds
            connection.sendall(piece)
            self._stop.wait(0.01)
        connection.sendall(end)
        connection.sendall(ANSWERS.get(path, b""))


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Contexts:
    """Return a server's context for `adapters.test` and a client's that trusts it."""
    key, made = certificate("adapters.test")
    file = tmp_path_factory.mktemp("tls") / "server.pem"
    file.write_bytes(key + made)
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server.load_cert_chain(file)
    return server, ssl.create_default_context(cadata=made.decode())


@pytest.fixture
def server(tls: Contexts) -> Iterator[Server]:
    server = Server(tls[0])
    yield server
    server.close()


def https(
    server: Server,
    tls: Contexts,
    *,
    host: str = "adapters.test",
    addresses: Sequence[str] = ("127.0.0.1",),
    **options: Any,
) -> RemoteSources:
    arguments: dict[str, Any] = {
        "allowed_address": lambda _address: True,
        "max_bytes": len(DATA),
        "timeout_s": 10,
    } | options
    prefix = f"https://{host}:{server.port}/v1/"
    return RemoteSources([prefix], resolve=lambda _host, _port: list(addresses), tls=tls[1], **arguments)


@pytest.mark.parametrize("path", ["ok", "chunked"])
def test_download_uses_the_checked_address_and_no_proxy(
    server: Server, tls: Contexts, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    checked: list[str] = []

    def allowed(address: object) -> bool:
        checked.append(str(address))
        return True

    sources = https(server, tls, allowed_address=allowed)
    assert sources.fetch(f"https://adapters.test:{server.port}/v1/{path}") == DATA
    assert checked == ["127.0.0.1"]
    ((host, request),) = server.seen
    assert host == "adapters.test"
    assert request.startswith(b"GET /v1/%s HTTP/1.1\r\n" % path.encode())
    assert b"host: adapters.test:%d\r\n" % server.port in request.lower()


@pytest.mark.parametrize("addresses", [["127.0.0.1"], ["8.8.8.8", "127.0.0.1"], ["::ffff:127.0.0.1"], []])
def test_hub_never_connects_when_one_address_of_the_host_is_not_public(
    server: Server, tls: Contexts, addresses: Sequence[str]
) -> None:
    sources = https(server, tls, addresses=addresses, allowed_address=is_global)
    assert "not public" in refusal(sources, f"https://adapters.test:{server.port}/v1/ok")
    assert server.seen == []


def test_loopback_is_refused_when_the_system_resolves_the_host(server: Server, tls: Contexts) -> None:
    sources = RemoteSources([f"https://localhost:{server.port}/"], max_bytes=1, tls=tls[1])
    assert "not public" in refusal(sources, f"https://localhost:{server.port}/v1/ok")
    assert server.seen == []


def test_download_fails_when_the_certificate_is_another_host_s(server: Server, tls: Contexts) -> None:
    detail = refusal(https(server, tls, host="other.test"), f"https://other.test:{server.port}/v1/ok", Unavailable)
    assert "certificate verify failed" in detail
    assert server.seen == []


def test_download_uses_the_next_address_when_the_first_refuses_connections(server: Server, tls: Contexts) -> None:
    sources = https(server, tls, addresses=["127.0.0.2", "127.0.0.1"])
    assert sources.fetch(f"https://adapters.test:{server.port}/v1/ok") == DATA
    nobody = https(server, tls, addresses=["127.0.0.2", "127.0.0.3"])
    assert "cannot be read" in refusal(nobody, f"https://adapters.test:{server.port}/v1/ok", Unavailable)


@pytest.mark.parametrize(
    ("path", "kind", "message"),
    [
        ("moved", InvalidRequest, "redirects (302), and the hub does not follow redirects"),
        ("absent", InvalidRequest, "answers 404"),
        ("partial", InvalidRequest, "answers 206"),
        ("gzip", InvalidRequest, "compressed"),
        ("broken", Unavailable, "answers 500"),
        ("short", Unavailable, "cannot be read"),
        ("noise", Unavailable, "cannot be read"),
        ("nothing", Unavailable, "cannot be read"),
        ("large", TooLarge, f"more than {len(DATA)} bytes"),
    ],
)
def test_download_fails_when_the_response_is_not_a_file(
    server: Server, tls: Contexts, path: str, kind: type[HubError], message: str
) -> None:
    assert message in refusal(https(server, tls), f"https://adapters.test:{server.port}/v1/{path}", kind)


@pytest.mark.parametrize("path", ["slow-header", "slow-body"])
def test_download_is_unavailable_when_it_exceeds_its_timeout(server: Server, tls: Contexts, path: str) -> None:
    sources = https(server, tls, timeout_s=0.5)
    detail = refusal(sources, f"https://adapters.test:{server.port}/v1/{path}", Unavailable)
    assert detail == "The source did not send the file within 0.5 s. Retry later."


def test_download_is_unavailable_when_the_host_has_no_address(tls: Contexts) -> None:
    def no_address(_host: str, _port: int) -> list[str]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    sources = RemoteSources(["https://adapters.test/"], max_bytes=1, resolve=no_address)
    assert "no address" in refusal(sources, "https://adapters.test/a", Unavailable)
