"""Commands print no control character of a registry that an older hub has filled."""

import json
import re
import sys
from pathlib import Path

import pytest
from rich.progress import Progress
from typer.testing import CliRunner

from adapters import Adapter
from hub.cli.main import app, main
from hub.cli.output import PlainConsole
from hub.registry.audit import OPERATOR
from hub.registry.keys import KeyRegistry
from hub.registry.redis.connection import RegistryConnection
from hub.registry.tasks import TaskRegistry
from hub.schemas import VersionInfo
from hub.services.archives.tenant_archive import version_fields
from tests.support.hub_app import OCTETS, Hub, in_registry
from tests.support.models import png

EVIL = "\x1b]0;PWNED\x07\x1b[2Jx\x9b31m\x7f\u202e\r"
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


@pytest.fixture
def old(hub: Hub, url: str, adapters: list[Adapter], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Fill a registry with names and labels that this hub refuses; return an image."""
    posted = hub.http.post("/v1/tasks/good/versions", content=adapters[0].data, headers=OCTETS)
    assert posted.status_code == 201

    async def fill(database: RegistryConnection) -> None:
        await KeyRegistry(database).create(OPERATOR, "default", "caller", EVIL)
        registry = TaskRegistry(database)
        fields = version_fields(adapters[0])
        fields |= {"labels": [f"{EVIL}{i}" for i in range(5)], "backbone": EVIL, "metrics": {EVIL: EVIL}}
        bad = VersionInfo(version=0, registered="2026-01-01T00:00:00+00:00", **fields)
        await registry.register(OPERATOR, "default", "bad", bad, ["latest"], EVIL)

    in_registry(hub.redis_url, fill)
    monkeypatch.setenv("HUB_URL", url)
    monkeypatch.setenv("HUB_KEY", hub.key)
    monkeypatch.setenv("HUB_ADMIN_KEY", hub.admin_key)
    image = tmp_path / "image.png"
    image.write_bytes(png())
    return image


def test_command_prints_escapes_when_names_and_labels_have_control_characters(old: Path) -> None:
    shown = 0
    for arguments in (
        ("tenants", "keys", "default"),
        ("tenants", "audit", "default"),
        ("tenants", "audit"),
        ("tasks",),
        ("versions", "bad"),
        ("classify", "bad", str(old)),
        ("classify", "bad", str(old), "--csv"),
        ("top", "--once"),
    ):
        for options in ((), ("--json",)):
            done = CliRunner().invoke(app, [*arguments, *options])
            if done.exit_code == 2:  # not both --csv and --json
                continue
            assert done.exit_code == 0, done.output
            assert not CONTROL.search(done.output), arguments
            shown += "PWNED" in done.output
            if options and arguments[0] == "classify":
                assert json.loads(done.stdout)["predictions"][0][0]["label"].startswith(EVIL)
    assert shown >= 8


def test_error_prints_escapes_when_it_repeats_a_label(
    old: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], adapters: list[Adapter]
) -> None:
    file = old.with_name("adapter.safetensors")
    adapters[1].write(file)
    monkeypatch.setattr(sys, "argv", ["karst-hub", "register", "bad", str(file)])
    with pytest.raises(SystemExit):
        main()
    printed = capsys.readouterr().err
    assert "PWNED" in printed
    assert not CONTROL.search(printed)


def test_progress_bar_keeps_its_own_codes_when_its_text_is_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    console = PlainConsole(force_terminal=True, markup=False)
    with Progress(console=console) as progress:
        progress.add_task("ab\x9bc", total=2)
    printed = capsys.readouterr().out
    assert "\x1b[" in printed
    assert "\x9b" not in printed
    assert "ab\\" in printed  # the bar leaves no room for more
