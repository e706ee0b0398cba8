"""Start with a registry that cannot be used: each error has Redis's own words and the remedy, but no password."""

import re
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hub.cli.main import app
from hub.local import preflight
from hub.local.embedded_redis import embedded_redis, find_redis_server
from hub.local.errors import StartError
from hub.local.ports import free_port
from tests.support.hub_app import first_keys_of
from tests.support.models import listens, wait_until
from tests.support.redis_servers import redis_server, two_servers
from tests.support.tls import certificate

SECRET = "hunter2"


def refusal(url: str) -> str:
    """Return the error of a start with this registry."""
    with pytest.raises(StartError) as caught:
        preflight.check_registry(url)
    assert SECRET not in str(caught.value)
    assert str(caught.value).startswith("HUB_REDIS_URL=")
    return str(caught.value)


@pytest.mark.parametrize("policy", ["allkeys-lru", "allkeys-random", "volatile-lru"])
def test_a_redis_that_evicts_is_refused(tmp_path: Path, policy: str) -> None:
    with redis_server(tmp_path, "--maxmemory", "100mb", "--maxmemory-policy", policy) as server:
        text = refusal(server.url)
        assert f"maxmemory-policy of this Redis is {policy}" in text
        assert "CONFIG SET maxmemory-policy noeviction" in text
        server.client.config_set("maxmemory-policy", "noeviction")
        preflight.check_registry(server.url)


def test_a_replica_is_refused(tmp_path: Path) -> None:
    with two_servers(tmp_path) as (first, second, _):
        assert f"is a replica of 127.0.0.1:{first.port}" in refusal(second.url)
        preflight.check_registry(first.url)
        second.promote()
        preflight.check_registry(second.url)


def test_a_sentinel_is_refused_by_name(tmp_path: Path) -> None:
    port, config = free_port(), tmp_path / "sentinel.conf"
    config.write_text(f"port {port}\ndir {tmp_path}\n")
    sentinel = subprocess.Popen([find_redis_server(), str(config), "--sentinel"], stdout=subprocess.DEVNULL)
    try:
        wait_until(lambda: listens(port))
        assert "This server is a Redis Sentinel" in refusal(f"redis://127.0.0.1:{port}")
    finally:
        sentinel.terminate()
        sentinel.wait(10)
    assert "Redis Sentinel URLs are not supported" in refusal(f"redis+sentinel://:{SECRET}@127.0.0.1:{port}/primary/0")


def test_a_cluster_is_refused_by_name(tmp_path: Path) -> None:
    with redis_server(tmp_path, "--cluster-enabled", "yes") as server:
        assert "runs in cluster mode" in refusal(server.url)


def test_the_words_of_a_redis_with_a_password_are_shown(tmp_path: Path) -> None:
    with redis_server(tmp_path, password="right") as server:
        assert "WRONGPASS" in refusal(f"redis://:{SECRET}@127.0.0.1:{server.port}/0")
        assert "Correct user and password" in refusal(f"redis://:{SECRET}@127.0.0.1:{server.port}/0")
        assert "NOAUTH" in refusal(server.url)
        assert "Add the password to HUB_REDIS_URL" in refusal(server.url)


def test_missing_permissions_are_shown_and_the_remedy_works(tmp_path: Path) -> None:
    with redis_server(tmp_path) as server:
        url = f"redis://hub:{SECRET}@127.0.0.1:{server.port}/0"
        server.client.acl_setuser("hub", True, passwords=[f"+{SECRET}"], keys=["karst:*"], categories=["+@read"])
        text = refusal(url)
        assert "NOPERM" in text
        assert "ACL SETUSER NAME ~karst:* +@all -@admin" in text
        server.client.acl_setuser(
            "hub", True, passwords=[f"+{SECRET}"], keys=["karst:*"], categories=["+@all", "-@admin"]
        )
        preflight.check_registry(url)
        done = CliRunner().invoke(app, ["admin-key"], env={"HUB_REDIS_URL": url})
        assert done.stdout.startswith("HUB_ADMIN_KEY=kh_")


def test_a_wrong_database_is_shown(tmp_path: Path) -> None:
    with redis_server(tmp_path) as server:
        text = refusal(f"redis://127.0.0.1:{server.port}/99")
        assert "DB index is out of range" in text
        assert "databases 0 to 15" in text


def test_the_words_of_the_socket_are_shown(tmp_path: Path) -> None:
    port = free_port()
    text = refusal(f"redis://:{SECRET}@127.0.0.1:{port}/0")
    assert "(Connection refused). Start Redis, or correct the host and the port" in text
    assert "The host in HUB_REDIS_URL has no address" in refusal(f"redis://:{SECRET}@no-such-host.invalid/0")
    assert "correct the path of its socket" in refusal(f"unix://{tmp_path}/none.sock?password={SECRET}")


@contextmanager
def tls_listener(folder: Path) -> Iterator[tuple[int, Path]]:
    """Run a TLS server with a self-signed certificate for `localhost`, which closes every connection."""
    key, cert = certificate("localhost")
    (folder / "key.pem").write_bytes(key)
    (folder / "cert.pem").write_bytes(cert)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with suppress(OSError):
            while True:
                plain, _ = listener.accept()
                with closing(plain), suppress(OSError), context.wrap_socket(plain, server_side=True):
                    pass

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield listener.getsockname()[1], folder / "cert.pem"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(10)


def test_the_words_of_tls_are_shown(tmp_path: Path) -> None:
    with tls_listener(tmp_path) as (port, cert), redis_server(tmp_path / "plain") as plain:
        text = refusal(f"rediss://:{SECRET}@localhost:{port}/0")
        assert "CERTIFICATE_VERIFY_FAILED" in text
        assert "?ssl_ca_certs=/PATH/TO/CA.pem" in text
        trusted = refusal(f"rediss://:{SECRET}@localhost:{port}/0?ssl_ca_certs={cert}")
        assert "CERTIFICATE_VERIFY_FAILED" not in trusted
        assert "without TLS use redis://" in refusal(f"rediss://localhost:{plain.port}/0")
        assert "needs rediss://" in refusal(f"redis://127.0.0.1:{port}/0")


def test_a_server_that_is_not_redis_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with suppress(OSError):
                while True:
                    client, _ = listener.accept()
                    with closing(client):
                        client.recv(100)
                        client.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=serve)
        thread.start()
        text = refusal(f"redis://127.0.0.1:{listener.getsockname()[1]}/0")
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(10)
    assert "is not Redis" in text


def test_a_full_redis_is_shown(tmp_path: Path) -> None:
    with redis_server(tmp_path, "--maxmemory", "1") as server:
        done = CliRunner().invoke(app, ["admin-key"], env={"HUB_REDIS_URL": server.url})
        assert done.exit_code == 1
        assert "Redis said: OOM command not allowed" in str(done.exception)
        assert "Raise its maxmemory" in str(done.exception)


@pytest.mark.parametrize(
    "url",
    [
        f"redis://:{SECRET}",
        f"redis://user:{SECRET}/0",
        f"redis://:a/{SECRET}@127.0.0.1:1/0",
        f"http://user:{SECRET}@host",
        f"redis://:{SECRET}@127.0.0.1:1/0",
        f"redis://127.0.0.1:1/0?password={SECRET}",
        f"redis+sentinel://:{SECRET}@h/m",
        f":{SECRET}@h",
    ],
)
@pytest.mark.parametrize("command", ["admin-key", "serve"])
def test_a_command_shows_no_password_when_the_registry_cannot_be_used(
    command: str, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = {"HUB_REDIS_URL": url, "HUB_HOME": str(tmp_path), "HUB_PORT": str(free_port())}
    done = CliRunner().invoke(app, [command], env=environment)
    output = done.output + str(done.exception)
    assert isinstance(done.exception, StartError | SystemExit)
    assert SECRET not in output
    assert "HUB_REDIS_URL=" in output


def test_login_link_has_the_hubs_address_and_makes_no_home(tmp_path: Path) -> None:
    environment = {"HUB_HOME": str(tmp_path / "home"), "HUB_URL": "https://hub.example/"}
    done = CliRunner().invoke(app, ["login-link"], env=environment)
    assert isinstance(done.exception, StartError)
    assert str(done.exception) == f"No hub has run in {tmp_path / 'home'}. Set HUB_HOME to the folder of the hub."
    assert list(tmp_path.iterdir()) == []
    with embedded_redis(tmp_path / "home") as url:
        first_keys_of(url)
    done = CliRunner().invoke(app, ["login-link"], env=environment)
    assert re.fullmatch(r"https://hub\.example/#/login/\S+\n", done.stdout)


def test_an_empty_url_is_as_good_as_none(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["admin-key"], env={"HUB_REDIS_URL": "", "HUB_HOME": str(tmp_path)})
    assert done.exit_code == 0
    assert done.stdout.startswith("HUB_ADMIN_KEY=kh_")
