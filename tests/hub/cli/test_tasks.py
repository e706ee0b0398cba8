"""Tests of the commands for tasks against the hub's application."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from adapters import Adapter, Backbone
from adapters.method.karst import extract
from hub.cli.main import app
from hub.cli.output import out
from hub.schemas import VersionInfo
from tests.support.hub_app import Hub, bearer
from tests.support.models import random_adapter, random_model

Run = Callable[..., Result]


@pytest.fixture
def run(hub: Hub, url: str, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Function that runs a command with an owner key in the environment."""
    monkeypatch.setenv("HUB_URL", url)
    monkeypatch.setenv("HUB_KEY", hub.key)
    monkeypatch.delenv("HUB_ADMIN_KEY", raising=False)
    monkeypatch.setattr(out, "width", 200)  # COLUMNS would be too late: rich reads it when `out` is made
    return lambda *arguments: CliRunner().invoke(app, arguments)


def ok(done: Result) -> str:
    assert done.exit_code == 0, done.output or done.exception
    return done.stdout


def read(done: Result) -> Any:
    return json.loads(ok(done))


@pytest.fixture
def task(hub: Hub, backbone: Backbone) -> list[Adapter]:
    """Register three versions of the task `cells`; the last one recorded an accuracy."""
    files = [random_adapter(backbone, seed=i, classes=3) for i in range(2)]
    accuracy: dict[str, Any] = {"leave_one_out_accuracy": 0.915, "leave_one_out_interval": [0.85, 0.96]}
    model = random_model(backbone, seed=2, classes=3)
    files.append(extract(model, files[0].labels, metrics={"train_images": 120} | accuracy))
    for file in files:
        assert hub.http.post("/v1/tasks/cells/versions", content=file.data).status_code == 201
    return files


def test_tasks_and_versions_show_what_is_live_and_how_good_it_is(run: Run, task: list[Adapter]) -> None:
    (summary,) = read(run("tasks", "--json"))["tasks"]
    assert summary["latest"] == 3
    assert summary["accuracy"] == {
        "accuracy": 0.915,
        "interval": [0.85, 0.96],
        "images": 120,
        "measured_on": "left-out images",
    }
    row = next(line for line in ok(run("tasks")).splitlines() if "cells" in line)
    assert "91.5 % (85-96)" in row
    assert "120" in row
    lines = [line for line in ok(run("versions", "cells")).splitlines() if "20" in line]
    assert [("latest" in line, task[i].digest[:12] in line) for i, line in enumerate(lines)] == [
        (False, True),
        (False, True),
        (True, True),
    ]
    assert [v["version"] for v in read(run("versions", "cells", "--json"))["versions"]] == [1, 2, 3]


def test_aliases_canaries_and_roll_back(run: Run, task: list[Adapter]) -> None:
    assert ok(run("alias", "cells", "stable", "1")) == "cells: stable -> 1\n"
    assert ok(run("canary", "cells", "1=90", "2=10", "--alias", "stable")) == "cells: stable -> 1 (90 %), 2 (10 %)\n"
    assert "stable (90 %)" in ok(run("versions", "cells"))
    assert "stable -> 1 (90 %), 2 (10 %)" in ok(run("tasks"))
    assert ok(run("rollback", "cells", "--alias", "stable")) == "cells: stable -> 1\n"
    assert read(run("rollback", "cells", "--json"))["aliases"]["latest"] == {"2": 1}
    assert ok(run("alias", "cells", "stable", "--delete")) == "cells: no alias stable\n"
    assert set(read(run("versions", "cells", "--json"))["aliases"]) == {"latest"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("canary", "cells", "1=x"), "'1=x': expected VERSION=WEIGHT"),
        (("canary", "cells", "1=2", "1=3"), "version 1 is named twice"),
        (("alias", "cells", "stable"), "give either a version or --delete"),
        (("alias", "cells", "stable", "1", "--delete"), "give either a version or --delete"),
        (("share", "cells", "--public", "--stop"), "omit --tenant and --public"),
        (("delete", "cells"), "task cells with all its versions was not deleted: no confirmation"),
    ],
)
def test_wrong_options_are_a_usage_error(
    run: Run, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    done = run(*arguments)
    assert done.exit_code == 2
    assert message in done.stderr


def test_share_replaces_and_shows_the_list(run: Run, hub: Hub, task: list[Adapter]) -> None:
    assert ok(run("share", "cells")) == "cells: shared with no other tenant\n"
    hub.http.post("/v1/tenants", json={"tenant": "acme"}, headers=hub.admin)
    assert ok(run("share", "cells", "--tenant", "acme")) == "cells: shared with acme\n"
    assert read(run("share", "cells", "--json")) == {"public": False, "tenants": ["acme"]}
    assert ok(run("share", "cells", "--public")) == "cells: shared with all tenants\n"
    assert ok(run("share", "cells", "--stop")) == "cells: shared with no other tenant\n"


def test_usage_and_status(run: Run, hub: Hub, url: str, task: list[Adapter], monkeypatch: pytest.MonkeyPatch) -> None:
    assert read(run("usage", "--json"))["used"]["tasks"] == 1
    assert "stored_bytes" in ok(run("usage"))
    assert ok(run("status")) == f"{url}: ready\n"
    monkeypatch.setenv("HUB_ADMIN_KEY", hub.admin_key)
    assert "images/s" in ok(run("status"))
    assert set(read(run("status", "--json"))) == {"workers", "tasks", "tenants", "errors", "changes_refused"}


def test_token_works_in_place_of_the_key(run: Run, hub: Hub, task: list[Adapter]) -> None:
    held = ok(run("token", "cells", "--expires-s", "60")).strip().removeprefix("HUB_KEY=")
    assert hub.http.get("/v1/tasks/cells", headers=bearer(held)).status_code == 200
    assert read(run("token", "cells", "--origin", "https://a.example", "--json"))["origins"] == ["https://a.example"]


def test_download_and_deletion(run: Run, hub: Hub, task: list[Adapter], tmp_path: Path) -> None:
    file = tmp_path / "cells.safetensors"
    assert read(run("download", "cells", "-o", str(file), "--version", "2", "--json"))["bytes"] == len(task[1].data)
    assert file.read_bytes() == task[1].data
    assert ok(run("delete", "cells", "--version", "1", "--yes")) == "version 1 of task cells: deleted\n"
    assert read(run("delete", "cells", "--yes", "--json")) == {"task": "cells", "version": None}
    assert hub.http.get("/v1/tasks/cells", headers=bearer(hub.key)).status_code == 404


@pytest.mark.parametrize(
    ("metrics", "accuracy"),
    [
        (None, None),
        ({"test_accuracy": "high"}, None),
        ({"test_accuracy": True}, None),
        ({"test_accuracy": 7}, None),
        ({"val_accuracy": 0.5}, 0.5),
        ({"val_accuracy": 0.5, "test_accuracy": 0.25, "test_interval": [0.2]}, 0.25),
        ({"held_out_accuracy": 1, "held_out_interval": [0.9, 1], "train_images": -3}, 1),
        ({"test_accuracy": 0, "test_images": 2, "leave_one_out_accuracy": 0.75}, 0.75),  # two test images say little
        ({"test_accuracy": 0.5, "test_images": 10, "leave_one_out_accuracy": 0.75}, 0.5),
        ({"test_accuracy": 0.5, "test_images": 2}, 0.5),
    ],
)
def test_accuracy_is_read_from_metrics_of_any_kind(metrics: dict[str, Any] | None, accuracy: float | None) -> None:
    common: Any = {"version": 1, "digest": "", "labels": [], "backbone": "", "fingerprint": "", "config": {}}
    info = VersionInfo(**common, preprocess={}, metrics=metrics, size_bytes=0, registered="")
    found = info.measured_accuracy()
    assert (found.accuracy if found else None) == accuracy
    assert info.train_images() is None
