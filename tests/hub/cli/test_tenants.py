"""Tests of `karst-hub tenants ...`, `register`, `classify`, `gc` and `admin-key` against the hub's application."""

import csv
import fcntl
import io
import json
import sys
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from typer.testing import CliRunner

from adapters import Adapter, Backbone
from hub.cli.main import app, main
from hub.cli.output import out, show
from hub.local.embedded_redis import embedded_redis
from hub.registry.keys import KeyRecord, KeyRegistry, key_id
from hub.registry.redis.connection import RegistryConnection
from tests.support.hub_app import OCTETS, Hub, bearer, in_registry
from tests.support.models import calibrated_adapter, flat_png, png

Run = Callable[..., str]


@pytest.fixture
def run(hub: Hub, url: str, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Function that runs a command with the admin key in the environment, and returns its output."""
    monkeypatch.setenv("HUB_URL", url)
    monkeypatch.setenv("HUB_ADMIN_KEY", hub.admin_key)
    monkeypatch.setattr(out, "width", 200)  # COLUMNS would be too late: rich reads it when `out` is made

    def run(*arguments: str) -> str:
        done = CliRunner().invoke(app, arguments, catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.stdout

    return run


async def record_of(key: str, database: RegistryConnection) -> KeyRecord | None:
    return await KeyRegistry(database).find(key_id(key))


def secret(printed: str) -> str:
    """Return the key in the output of a command."""
    return next(line for line in printed.splitlines() if line.startswith("HUB_KEY=")).removeprefix("HUB_KEY=")


def test_commands_manage_a_tenant_from_creation_to_deletion(
    hub: Hub, run: Run, adapters: list[Adapter], tmp_path: Path
) -> None:
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


def test_tables_show_whole_ids_when_the_terminal_has_80_columns(
    hub: Hub, run: Run, adapters: list[Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(out, "width", 80)
    name = "the camera above the second window of hall 7"
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


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("create", "acme", "--tasks", "-1"), 2, "error: --tasks -1: Input should be greater than or equal to 0"),
        (("limits", "nobody"), 1, "error: tenant: "),
        (("usage", "default", "--key", "kh_wrong"), 1, "error: "),
    ],
)
def test_command_prints_one_line_when_its_input_is_invalid(
    hub: Hub,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    code: int,
    message: str,
) -> None:
    monkeypatch.setattr(sys, "argv", ["karst-hub", "tenants", *arguments])
    with pytest.raises(SystemExit) as exit:
        main()
    stderr = capsys.readouterr().err
    assert exit.value.code == code
    assert stderr.startswith(message)
    assert stderr.count("\n") == 1


def test_command_names_both_variables_when_the_key_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HUB_ADMIN_KEY", "HUB_KEY"):
        monkeypatch.delenv(name, raising=False)
    done = CliRunner().invoke(app, ["tenants", "create", "acme"])
    assert done.exit_code == 2
    assert "Missing option '--key' (env var: 'HUB_ADMIN_KEY or HUB_KEY')" in done.stderr


def test_delete_fails_and_names_the_option_yes_when_there_is_no_confirmation(run: Run) -> None:
    run("tenants", "create", "acme")
    done = CliRunner().invoke(app, ["tenants", "delete", "acme"])
    assert done.exit_code == 2
    assert "--yes" in done.stderr
    assert "acme" in run("tenants", "list")
    assert CliRunner().invoke(app, ["tenants", "delete", "acme"], input="y\n").exit_code == 0
    assert "acme" not in run("tenants", "list")


def test_register_prints_what_is_live_and_moves_nothing_when_the_file_is_known(
    hub: Hub, run: Run, adapters: list[Adapter], tmp_path: Path
) -> None:
    files = [tmp_path / f"{i}.safetensors" for i in range(2)]
    for file, adapter in zip(files, adapters, strict=False):
        file.write_bytes(adapter.data)
    key = ("--key", hub.key)
    first = run("register", "digits", str(files[0]), *key)
    assert first == f"digits version 1: 5 labels, digest {adapters[0].digest[:12]}\naliases: latest\n"
    second = run("register", "digits", str(files[1]), "--alias", "stable", *key).splitlines()
    assert second[1:] == ["aliases: latest, stable", "accuracy: version 2 -, version 1 -"]
    again = run("register", "digits", str(files[0]), *key)
    assert again == "digits: already registered as version 1; no alias moved (`karst-hub alias` moves one)\n"
    files[0].write_bytes(adapters[2].data)
    staged = run("register", "digits", str(files[0]), "--stage", *key).splitlines()
    assert staged[1] == "aliases: none; clients call it by its number"
    assert json.loads(run("versions", "digits", "--json", *key))["aliases"]["latest"] == {"2": 1}


def test_register_and_settings_change_the_threshold_of_unknown_images(
    hub: Hub, run: Run, adapters: list[Adapter], tmp_path: Path
) -> None:
    file = tmp_path / "a.safetensors"
    file.write_bytes(adapters[0].data)
    key = ("--key", hub.key)
    printed = run("register", "digits", str(file), "--unknown-below", "0.05", *key).splitlines()
    assert printed[2:] == ["digits: images with a typicality below 0.05 are unknown"]
    printed = run("register", "digits", str(file), "--unknown-below", "0.1", *key).splitlines()
    assert printed == [
        "digits: already registered as version 1; no alias moved (`karst-hub alias` moves one)",
        "digits: images with a typicality below 0.1 are unknown",
    ]
    assert run("settings", "digits", *key) == "digits: images with a typicality below 0.1 are unknown\n"
    changed = "digits: images with a typicality below 0.2 are unknown\n"
    assert run("settings", "digits", "--unknown-below", "0.2", *key) == changed
    assert json.loads(run("settings", "digits", "--json", *key)) == {"task": "digits", "unknown_below": 0.2}
    assert hub.http.get("/v1/tasks/digits").json()["unknown_below"] == 0.2
    for command in (("settings", "digits"), ("register", "digits", str(file))):
        assert CliRunner().invoke(app, [*command, "--unknown-below", "2", *key]).exit_code == 2


def test_classify_shows_typicality_and_sets_where_the_adapter_has_them(
    hub: Hub, run: Run, adapters: list[Adapter], backbone: Backbone, tmp_path: Path
) -> None:
    adapter = calibrated_adapter(backbone)
    for task, data in (("noise", adapter.data), ("old", adapters[0].data)):
        hub.http.post(f"/v1/tasks/{task}/versions", content=data, headers=OCTETS)
    own, foreign = tmp_path / "own.png", tmp_path / "foreign.png"
    own.write_bytes(png(1))
    foreign.write_bytes(flat_png())
    key = ("--key", hub.key)
    files = (str(own), str(foreign))

    def rows(*arguments: str) -> list[list[str]]:
        lines = [line for line in run("classify", *arguments, *key).splitlines() if ".png" in line]
        return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]

    reply = json.loads(run("classify", "noise", *files, "--coverage", "0.9", "--json", *key))
    assert reply["unknown"] == [False, True]
    shown = rows("noise", *files, "--coverage", "0.9")
    assert [row[3] for row in shown] == [
        f"{reply['typicality'][0]:.3f}",
        f"{reply['typicality'][1]:.3f} unknown",
    ]
    assert [row[4] for row in shown] == [", ".join(labels) for labels in reply["sets"]]
    assert [len(row) for row in rows("noise", *files)] == [4, 4]
    assert [row[3] for row in rows("noise", str(foreign), "--top-k", "2")] == [shown[1][3], ""]
    assert [len(row) for row in rows("old", *files)] == [3, 3]
    refused = CliRunner().invoke(app, ["classify", "old", str(own), "--coverage", "0.9", *key])
    assert refused.exit_code == 1
    assert "error: coverage: version 1 of task 'old' has no data for label sets" in refused.stderr


def test_classify_answers_with_many_tasks_and_names_those_that_cannot(
    hub: Hub, run: Run, adapters: list[Adapter], backbone: Backbone, tmp_path: Path
) -> None:
    files = [tmp_path / "own.png", tmp_path / "grey.png", tmp_path / "bad.png"]
    for file, data in zip(files, (png(1), flat_png(), b"no image"), strict=True):
        file.write_bytes(data)
    for task, adapter in (("old", adapters[0]), ("noise", calibrated_adapter(backbone))):
        hub.http.post(f"/v1/tasks/{task}/versions", content=adapter.data, headers=OCTETS).raise_for_status()
    hub.http.put("/v1/tasks/empty").raise_for_status()
    key = ("--key", hub.key)
    assert run("classify", "--tasks", "noise", str(files[0]), *key).count("noise") == 1

    done = CliRunner().invoke(app, ["classify", "--tasks", "*", str(files[0]), str(files[1]), *key])
    assert done.exit_code == 0, done.output
    lines = [line.split() for line in done.stdout.splitlines() if ".png" in line or "noise" in line or "old" in line]
    assert sum("noise" in line for line in lines) == sum("old" in line for line in lines) == 2
    assert "unknown" in done.stdout
    assert "task empty cannot answer" in done.stderr

    named = CliRunner().invoke(app, ["classify", str(files[0]), "--tasks", "noise, old", "--csv", *key])
    assert [row["task"] for row in csv.DictReader(io.StringIO(named.stdout))] == ["noise", "old"]
    bad = CliRunner().invoke(app, ["classify", "--tasks", "*", *map(str, files), "--json", *key])
    assert bad.exit_code == 1
    reply = json.loads(bad.stdout)
    assert [len(image["results"]) for image in reply["images"]] == [2, 2]
    assert [image["image"] for image in reply["refused"]] == [str(files[2])]
    missing = CliRunner().invoke(app, ["classify", "--tasks", "none", str(files[0]), *key])
    assert (missing.exit_code, "there is no task 'none'" in missing.stderr) == (1, True)
    for wrong in (["--tasks", "*", "--version", "1", str(files[0])], ["noise"]):
        assert CliRunner().invoke(app, ["classify", *wrong, *key]).exit_code == 2


def test_classify_names_the_file_when_an_image_is_invalid(
    hub: Hub, run: Run, adapters: list[Adapter], tmp_path: Path
) -> None:
    hub.http.post("/v1/tasks/digits/versions", content=adapters[0].data, headers=OCTETS)
    good, bad = tmp_path / "good.png", tmp_path / "bad.png"
    good.write_bytes(png(0))
    bad.write_bytes(b"no image")
    done = CliRunner().invoke(app, ["classify", "digits", str(good), str(bad), "--key", hub.key])
    assert done.exit_code == 1
    assert done.stderr.startswith(f"error: {bad}: ")
    assert "images." not in done.stderr


def test_classify_answers_a_folder_and_lists_the_images_that_are_refused(
    hub: Hub, run: Run, adapters: list[Adapter], tmp_path: Path
) -> None:
    hub.http.post("/v1/tasks/digits/versions", content=adapters[0].data, headers=OCTETS)
    folder = tmp_path / "images"
    files = [folder / name for name in ("a/10.png", "a/9.png", "b/c/1.png")]
    for i, file in enumerate(files):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png(i))
    bad = folder / "a" / "bad.png"
    bad.write_bytes(b"no image")
    for name in ("a/.DS_Store", "a/._9.png", "__MACOSX/9.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"")
    command = ["classify", "digits", str(folder), "--key", hub.key]
    done = CliRunner().invoke(app, [*command, "--json"])
    assert done.exit_code == 1
    answer = json.loads(done.stdout)
    assert answer["images"] == list(map(str, files))
    assert len(answer["predictions"]) == 3
    assert [refused["image"] for refused in answer["refused"]] == [str(bad)]
    assert done.stderr.count("error: ") == 1
    rows = list(csv.DictReader(io.StringIO(CliRunner().invoke(app, [*command, "--csv", "--top-k", "2"]).stdout)))
    assert [row["image"] for row in rows] == [str(file) for file in files for _ in range(2)] + [str(bad)]
    assert [bool(row["label"]) for row in rows] == [True] * 6 + [False]
    assert rows[-1]["error"] == answer["refused"][0]["error"]
    assert CliRunner().invoke(app, [*command, "--csv", "--json"]).exit_code == 2
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "no files" in CliRunner().invoke(app, ["classify", "digits", str(empty), "--key", hub.key]).stderr


def test_admin_key_creates_a_key_when_the_hub_runs_and_when_it_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HUB_HOME", str(tmp_path))
    monkeypatch.delenv("HUB_REDIS_URL", raising=False)

    def new_key() -> str:
        done = CliRunner().invoke(app, ["admin-key"], catch_exceptions=False)
        assert done.exit_code == 0
        return done.stdout.strip().removeprefix("HUB_ADMIN_KEY=")

    keys = [new_key()]  # the hub is stopped
    with embedded_redis(tmp_path) as url, (tmp_path / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the hub runs
        keys.append(new_key())
        records = [in_registry(url, partial(record_of, key)) for key in keys]
    assert [record and record.role for record in records] == ["admin", "admin"]


def test_show_does_not_wrap_lines_when_stdout_is_not_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    show({"digest": "0" * 64, "path": "/a/long/way/" * 20, "labels": ["ü", "b"]}, False)
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["digest  " + "0" * 64, "path    " + "/a/long/way/" * 20, 'labels  ["ü", "b"]']
