"""Environment variables of a local hub."""

import os
from pathlib import Path

import pytest

from hub.local import ray_environment as module
from hub.local.ray_environment import ray_environment
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
