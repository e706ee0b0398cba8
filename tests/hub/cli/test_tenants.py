"""`karst-hub tenants ...` and `gc` against the hub's application: what they print, and that it is so."""

import fcntl
import json
import tarfile

import pytest
from typer.testing import CliRunner

from hub.cli.main import app
from hub.cli.output import show
from hub.local.embedded_redis import embedded_redis
from hub.registry.tenants import Tenants
from tests.support.hub_app import OCTETS, bearer, in_registry
from tests.support.models import png


@pytest.fixture
def run(hub, url, monkeypatch):
    """Runs a command with the admin key in the environment; gives what it printed."""
    monkeypatch.setenv("HUB_URL", url)
    monkeypatch.setenv("HUB_ADMIN_KEY", hub.admin_key)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: str) -> str:
        done = CliRunner().invoke(app, arguments, catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.stdout

    return run


def secret(printed: str) -> str:
    return next(line for line in printed.splitlines() if line.startswith("HUB_KEY=")).removeprefix("HUB_KEY=")


def test_a_tenant_by_commands(hub, run, adapters, tmp_path) -> None:
    owner = bearer(secret(run("tenants", "create", "acme", "--tasks", "3", "--weight", "2")))
    assert hub.http.post("/v1/tasks/a/versions", content=adapters[0].data, headers=OCTETS | owner).status_code == 201
    assert "acme" in run("tenants", "list")
    assert json.loads(run("tenants", "list", "--json"))["tenants"][0]["limits"]["tasks"] == 3

    caller = secret(run("tenants", "add-key", "acme", "camera", "--days", "30"))
    keys = json.loads(run("tenants", "keys", "acme", "--json"))["keys"]
    (camera,) = [key for key in keys if key["name"] == "camera"]
    assert (camera["role"], camera["expires"] is not None) == ("caller", True)
    assert camera["id"] in run("tenants", "keys", "acme")
    assert hub.http.get("/v1/tasks", headers=bearer(caller)).status_code == 200
    run("tenants", "revoke", "acme", camera["id"])
    assert hub.http.get("/v1/usage", headers=owner).json()["limits"]["weight"] == 2

    assert "requests_per_second" in run("tenants", "limits", "acme", "--requests-per-second", "7")
    assert json.loads(run("tenants", "limits", "acme", "--json"))["limits"]["requests_per_second"] == 7
    assert "stored_bytes" in run("tenants", "usage", "acme")
    printed = run("tenants", "audit", "acme")
    assert all(action in printed for action in ("tenant.create", "key.revoke", "version.register", "tenant.limits"))
    assert "tenant.create" in run("tenants", "audit")

    tar = tmp_path / "acme.tar"
    run("tenants", "export", "acme", str(tar))
    with tarfile.open(tar) as opened:
        assert opened.getnames()[0] == "tenant.json"
    run("tenants", "delete", "acme", "--yes")
    assert hub.http.get("/v1/tasks", headers=owner).status_code == 401
    again = bearer(secret(run("tenants", "create", "acme")))
    assert "1 task\n" in run("tenants", "import", "acme", str(tar))
    assert hub.http.get("/v1/tasks/a", headers=again).json()["labels"] == list(adapters[0].labels)

    run("tenants", "delete", "acme", "--yes")
    assert json.loads(run("gc", "--older-than-s", "0", "--json")) == {
        "removed": 1,
        "bytes": len(adapters[0].data),
        "kept": 0,
    }


def test_80_columns_have_room_for_what_is_of_use_only_whole(hub, run, adapters, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    name = "the camera above the second door of hall 7"
    run("tenants", "create", "acme")
    key = bearer(secret(run("tenants", "add-key", "acme", name, "--days", "30", "--owner")))
    assert hub.http.post("/v1/tasks/a/versions", content=adapters[0].data, headers=OCTETS | key).status_code == 201
    keys = json.loads(run("tenants", "keys", "acme", "--json"))["keys"]
    (camera,) = [found for found in keys if found["name"] == name]
    printed = run("tenants", "keys", "acme")
    for text in (*(found["id"] for found in keys), "owner", camera["expires"][:10]):
        assert text in printed
    printed = run("tenants", "audit", "acme")
    entries = json.loads(run("tenants", "audit", "acme", "--json"))["entries"]
    assert {"key.create", "version.register"} <= {entry["action"] for entry in entries}
    for entry in entries:
        for text in (entry["at"][:10], entry["at"][11:19], entry["key"], entry["action"], entry["tenant"]):
            assert text in printed
    for table in (printed, run("tenants", "keys", "acme"), run("tenants", "list")):
        assert "…" not in table
        assert max(map(len, table.splitlines())) <= 80


def test_what_is_wrong_is_said(hub, run) -> None:
    for arguments, code in (
        (("tenants", "create", "acme", "--tasks", "-1"), 2),
        (("tenants", "limits", "nobody"), 1),
        (("tenants", "usage", "default", "--key", "kh_wrong"), 1),
    ):
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code != 0, done.output
        assert code == 1 or done.exit_code == 2


def test_without_a_key_both_variables_are_named(monkeypatch) -> None:
    for name in ("HUB_ADMIN_KEY", "HUB_KEY"):
        monkeypatch.delenv(name, raising=False)
    done = CliRunner().invoke(app, ["tenants", "create", "acme"])
    assert done.exit_code == 2
    assert "Missing option '--key' (env var: 'HUB_ADMIN_KEY or HUB_KEY')" in done.stderr


def test_a_deletion_that_nobody_confirms_says_what_to_do(hub, run) -> None:
    run("tenants", "create", "acme")
    done = CliRunner().invoke(app, ["tenants", "delete", "acme"])
    assert done.exit_code == 2
    assert "--yes" in done.stderr
    assert "acme" in run("tenants", "list")
    assert CliRunner().invoke(app, ["tenants", "delete", "acme"], input="y\n").exit_code == 0
    assert "acme" not in run("tenants", "list")


def test_bytes_that_were_there_say_where_latest_is(hub, run, adapters, tmp_path) -> None:
    files = [tmp_path / f"{i}.safetensors" for i in range(2)]
    for file, adapter in zip(files, adapters, strict=False):
        file.write_bytes(adapter.data)
    key = ("--key", hub.key)
    assert "digits version 1: 3 labels" in run("register", "digits", str(files[0]), *key)
    assert "digits version 2: 4 labels" in run("register", "digits", str(files[1]), *key)
    again = run("register", "digits", str(files[0]), *key)
    assert again == "digits: was there already as version 1; latest is 1 now\n"
    again = run("register", "digits", str(files[1]), "--alias", "stable", *key)
    assert again == "digits: was there already as version 2; latest and stable are 2 now\n"


def test_a_wrong_image_is_named_by_its_file(hub, run, adapters, tmp_path) -> None:
    hub.http.post("/v1/tasks/digits/versions", content=adapters[0].data, headers=OCTETS)
    good, bad = tmp_path / "good.png", tmp_path / "bad.png"
    good.write_bytes(png(0))
    bad.write_bytes(b"no image")
    done = CliRunner().invoke(app, ["classify", "digits", str(good), str(bad), "--key", hub.key])
    assert done.exit_code == 1
    assert done.stderr.startswith(f"error: {bad}: ")
    assert "images." not in done.stderr


def test_a_lost_admin_key_is_replaced_on_the_hub_s_machine(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HUB_HOME", str(tmp_path))
    monkeypatch.delenv("HUB_REDIS_URL", raising=False)

    def made() -> str:
        done = CliRunner().invoke(app, ["admin-key"], catch_exceptions=False)
        assert done.exit_code == 0
        return done.stdout.strip().removeprefix("HUB_ADMIN_KEY=")

    keys = [made()]  # no hub runs
    with embedded_redis(tmp_path) as url, (tmp_path / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one does
        keys.append(made())
        roles = [in_registry(url, lambda db, key=key: Tenants(db).key(key)).role for key in keys]
    assert roles == ["admin", "admin"]


def test_a_digest_off_a_terminal_is_in_one_piece(capsys) -> None:
    show({"digest": "0" * 64, "path": "/a/long/way/" * 20, "labels": ["ü", "b"]}, False)
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["digest  " + "0" * 64, "path    " + "/a/long/way/" * 20, 'labels  ["ü", "b"]']
