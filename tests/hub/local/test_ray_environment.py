"""Environment variables of a local hub."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hub.local import ray_environment as module
from hub.local.ray_environment import home_variables, no_proxy, ray_environment
from hub.settings import Settings


def test_a_token_of_its_own_protects_each_hub(tmp_path: Path) -> None:
    tokens = set()
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        variables = ray_environment(Settings(), tmp_path / name)
        file = Path(variables["RAY_AUTH_TOKEN_PATH"])
        assert (variables["RAY_AUTH_MODE"], file.parent) == ("token", tmp_path / name)
        assert file.stat().st_mode & 0o077 == 0
        tokens.add(file.read_text())
    assert len(tokens) == 2
    assert min(map(len, tokens)) == 64


def test_haproxy_s_files_are_in_the_hub_s_folder(tmp_path: Path) -> None:
    variables = ray_environment(Settings(), tmp_path)
    paths = [value for name, value in variables.items() if name.startswith("RAY_SERVE_HAPROXY_") and "/" in value]
    assert len(paths) == 6
    assert all(Path(path).is_relative_to(tmp_path) for path in paths)
    assert os.access(variables["RAY_SERVE_HAPROXY_BINARY_PATH"], os.X_OK)
    assert variables["FORWARDED_ALLOW_IPS"] == "127.0.0.1"


def test_serve_s_own_proxy_removes_control_headers_and_trusts_the_configured_proxies(tmp_path: Path) -> None:
    variables = ray_environment(Settings(haproxy=False, trusted_proxies=("10.0.0.0/8", "::1")), tmp_path)
    assert variables["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"] == module.STOCK_PROXY_MIDDLEWARE
    assert variables["FORWARDED_ALLOW_IPS"] == "10.0.0.0/8,::1/128"
    assert not any("HAPROXY" in name for name in variables)


@pytest.mark.parametrize(("given", "expected"), [("3", "3"), (None, str(os.cpu_count()))])
def test_the_operator_s_number_of_threads_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str | None, expected: str
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    assert ray_environment(Settings(), tmp_path)["OMP_NUM_THREADS"] == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"localhost", "127.0.0.1", "::1"}),
        ({"NO_PROXY": "a.example, b.example"}, {"a.example", "b.example", "localhost", "127.0.0.1", "::1"}),
        ({"no_proxy": "localhost", "NO_PROXY": "c.example"}, {"localhost", "c.example", "127.0.0.1", "::1"}),
    ],
)
def test_local_calls_pass_the_proxy_by_and_the_operator_s_names_stay(given: dict[str, str], expected: set[str]) -> None:
    found = no_proxy(given)
    assert set(found) == {"no_proxy", "NO_PROXY"}
    for names in found.values():
        assert sorted(names.split(",")) == sorted(expected)


def test_grpc_s_own_list_of_names_gets_the_local_ones() -> None:
    assert no_proxy({"no_grpc_proxy": "d.example"})["no_grpc_proxy"] == "d.example,localhost,127.0.0.1,::1"


def test_grpc_connects_to_this_machine_although_a_proxy_is_set() -> None:
    """A real gRPC channel, as Ray Serve makes it, in a process with a proxy that does not answer."""
    code = """
import grpc
from concurrent import futures
server = grpc.server(futures.ThreadPoolExecutor(1))
port = server.add_insecure_port("127.0.0.1:0")
server.start()
try:
    grpc.channel_ready_future(grpc.insecure_channel(f"127.0.0.1:{port}")).result(3)
    print("connected")
except grpc.FutureTimeoutError:
    print("to the proxy")
"""
    proxy = dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")
    for variables, result in (({"no_proxy": ""}, "to the proxy"), (no_proxy({}), "connected")):
        done = subprocess.run(
            [sys.executable, "-c", code], env=os.environ | proxy | variables, capture_output=True, text=True, timeout=60
        )
        assert done.stdout.strip() == result, done.stderr


def test_a_user_with_an_entry_in_the_password_database_keeps_the_home() -> None:
    assert home_variables(Path("/srv/hub")) == {}


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_a_user_without_an_entry_gets_the_hub_s_home_and_a_name() -> None:
    # The modules are imported before the change of the user; the other user may not read them.
    code = """
import json, os
from pathlib import Path
from hub.local.ray_environment import home_variables
os.setuid(12345)
print(json.dumps(home_variables(Path("/srv/hub"))))
"""
    environment = {name: value for name, value in os.environ.items() if name not in ("HOME", "LOGNAME")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == {"HOME": "/srv/hub", "LOGNAME": "12345"}
