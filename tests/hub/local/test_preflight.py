"""Checks before a local hub starts: each fault is one error that names the setting and the reason."""

import socket
from pathlib import Path

import pytest

from hub.local import preflight
from hub.local.errors import StartError
from hub.local.ports import FREE_PORTS, check_port, free_port
from hub.local.preflight import check_open_files
from hub.settings import Settings


def test_a_second_hub_cannot_use_a_locked_home(tmp_path: Path) -> None:
    home = tmp_path / "home"
    with (
        preflight.locked_home(home),
        pytest.raises(StartError, match=f"Another hub runs in {home}. Stop it"),
        preflight.locked_home(home),
    ):
        pass
    with preflight.locked_home(home):  # the first hub has stopped
        pass


def test_a_home_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    home = tmp_path / "file" / "home"
    with pytest.raises(StartError, match=f"Cannot use HUB_HOME {home}: Not a directory"), preflight.locked_home(home):
        pass


def test_a_port_in_use_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(StartError, match=rf"Cannot listen on 127.0.0.1:{port} \(Address already in use\)"):
            check_port("127.0.0.1", port)
    check_port("127.0.0.1", port)


def test_a_free_port_is_in_the_range_that_linux_and_ray_do_not_use() -> None:
    port = free_port()
    assert port in FREE_PORTS
    check_port("127.0.0.1", port)


def test_the_import_names_belong_to_this_distribution_alone() -> None:
    preflight.check_import_names()


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("RECORD", "another/a.py,,\nhub/__init__.py,,\n"),
        ("RECORD", "hub.py,,\n"),
        ("top_level.txt", "another\nhub\n"),  # of an editable installation
    ],
)
def test_another_distribution_with_the_same_import_name_is_refused(
    file: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (record := tmp_path / "another_package-1.0.dist-info").mkdir()
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: another-package\nVersion: 1.0\n")
    (record / file).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(StartError, match="The package 'hub' also belongs to another-package"):
        preflight.check_import_names()


def test_another_distribution_may_have_folders_of_these_names_below_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (record := tmp_path / "another_package-1.0.dist-info").mkdir()
    (record / "RECORD").write_text("another/hub/a.py,,\nanother/adapters/a.py,,\n")
    monkeypatch.syspath_prepend(tmp_path)
    preflight.check_import_names()


def test_a_certificate_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    settings = Settings(tls_cert=tmp_path / "no.pem", tls_key=tmp_path / "no.key")
    with pytest.raises(StartError, match="HUB_TLS_CERT, HUB_TLS_KEY, HUB_TLS_CLIENT_CA: No such file or directory"):
        preflight.check_tls(settings)


@pytest.mark.parametrize("url", ["s3://bucket/prefix", "nonsense://x"])
def test_a_store_without_its_package_is_refused(url: str) -> None:
    with pytest.raises(StartError, match=f"HUB_STORE_URL={url}: "):
        preflight.check_store(url)


def test_a_source_without_its_package_is_refused() -> None:
    with pytest.raises(StartError, match="s3fs"):
        preflight.check_sources(Settings(sources=("s3://bucket/",)))


@pytest.mark.parametrize("url", ["http://host", "redis://127.0.0.1:1/0"])
def test_a_registry_that_cannot_be_used_is_refused(url: str) -> None:
    with pytest.raises(StartError, match=f"HUB_REDIS_URL={url}: "):
        preflight.check_registry(url)


def test_too_few_open_files_are_refused_with_the_ways_to_raise_the_limit() -> None:
    with pytest.raises(StartError, match=r"limit of open files is 256, and the hub needs 1024.*LimitNOFILE"):
        check_open_files(Settings(), 256)


@pytest.mark.parametrize(
    ("limit", "haproxy", "warnings"), [(1024, True, 1), (1024, False, 0), (10_400, True, 0), (-1, True, 0)]
)
def test_a_limit_of_open_files_that_costs_connections_is_a_warning(
    caplog: pytest.LogCaptureFixture, limit: int, haproxy: bool, warnings: int
) -> None:
    check_open_files(Settings(haproxy=haproxy), limit)
    assert len(caplog.records) == warnings
    assert all("at most 358 connections" in record.getMessage() for record in caplog.records)


def test_a_home_of_an_older_hub_becomes_private_at_the_next_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    home = tmp_path / "home"
    file, foreign = home / "store" / "ab" / "a.safetensors", home / "notes.txt"
    file.parent.mkdir(parents=True)
    for path in (file, foreign):
        path.write_text("text")
        path.chmod(0o644)
    for folder in (home, home / "store", file.parent):
        folder.chmod(0o755)
    for _ in range(2):
        with preflight.locked_home(home):
            modes = [path.stat().st_mode & 0o777 for path in (home, home / "store", file.parent, file, foreign)]
    assert modes == [0o700, 0o700, 0o700, 0o600, 0o644]
    assert len([line for line in caplog.messages if "removed the permissions of other users" in line]) == 1


def test_a_folder_of_all_users_stays_one_when_it_is_the_home(tmp_path: Path) -> None:
    tmp_path.chmod(0o1777)
    (tmp_path / "redis").mkdir(mode=0o755)
    preflight.tighten(tmp_path)
    assert tmp_path.stat().st_mode & 0o7777 == 0o1777
    assert (tmp_path / "redis").stat().st_mode & 0o777 == 0o700
