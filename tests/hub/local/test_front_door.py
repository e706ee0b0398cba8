"""The call that shows that a hub is ready."""

import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from hub.local.front_door import url_of, wait_until_answered
from hub.local.ports import free_port
from hub.settings import Settings
from tests.support.tls import certificate


@contextmanager
def server(*statuses: int, context: ssl.SSLContext | None = None) -> Iterator[tuple[int, list[str]]]:
    """Serve these statuses in turn, the last one for ever; yield the port and the requested paths."""
    paths: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(statuses[min(len(paths), len(statuses) - 1)])
            paths.append(self.path)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        if context is not None:
            http.socket = context.wrap_socket(http.socket, server_side=True)
        thread = Thread(target=http.serve_forever)
        thread.start()
        try:
            yield http.server_port, paths
        finally:
            http.shutdown()
            thread.join()


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_a_hub_is_ready_when_a_worker_has_answered(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")
    with server(503, 503, 200) as (port, paths):
        wait_until_answered(Settings(host=host, port=port))
    assert paths == ["/readyz"] * 3


def test_the_error_has_the_last_answer() -> None:
    with server(503) as (port, _), pytest.raises(TimeoutError, match=rf":{port}/readyz .* last: status 503"):
        wait_until_answered(Settings(port=port), timeout_s=0.3)
    with pytest.raises(TimeoutError, match="last: ConnectError: "):
        wait_until_answered(Settings(port=free_port()), timeout_s=0.3)


def test_a_certificate_for_another_name_is_no_error(tmp_path: Path) -> None:
    key, cert = certificate("hub.example.org")
    (tmp_path / "key").write_bytes(key)
    (tmp_path / "cert").write_bytes(cert)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert", tmp_path / "key")
    settings = Settings(tls_cert=tmp_path / "cert", tls_key=tmp_path / "key")
    with server(200, context=context) as (port, paths):
        wait_until_answered(settings.model_copy(update={"port": port}))
    assert paths == ["/readyz"]
    context.verify_mode = ssl.CERT_REQUIRED
    with server(200, context=context) as (port, paths):
        wait_until_answered(settings.model_copy(update={"port": port, "tls_client_ca": tmp_path / "cert"}))
    assert paths == []


@pytest.mark.parametrize(
    ("settings", "url"),
    [
        (Settings(host="::1", port=1), "http://[::1]:1"),
        (Settings(host="hub", port=2, tls_cert=Path("c"), tls_key=Path("k")), "https://hub:2"),
    ],
)
def test_the_url_has_the_scheme_and_an_address_as_in_urls(settings: Settings, url: str) -> None:
    assert url_of(settings) == url
