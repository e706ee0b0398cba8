"""The command `karst-hub`: errors are one line with an exit code, and every command has help."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hub.cli.main import main
from hub.local.ports import free_port
from tests.support.models import coloured_noise


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str, **variables: str) -> int:
    """Run a command in this process, and return its exit code."""
    monkeypatch.setattr(sys, "argv", ["karst-hub", *arguments])
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as ended:
        main()
    code = ended.value.code
    assert isinstance(code, int)
    return code


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["inspect", "/absent.safetensors"], 1, "error: file: /absent.safetensors: No such file or directory"),
        (["train", "/absent", "-o", "/tmp/x.safetensors"], 1, "error: /absent: no such folder"),
        (["train", "/absent", "-o", "/no/x.safetensors"], 1, "error: /no/x.safetensors: the folder /no does not exist"),
        (["train", "/absent", "-o", "x", "--rescale", "some"], 2, "error: --rescale some: Input should be"),
        (["tasks", "--url", "http://127.0.0.1:9", "--key", "k"], 1, "error: no hub answers at http://127.0.0.1:9"),
        (["register", "a", "/absent", "--key", "k"], 1, "error: /absent: No such file or directory"),
    ],
)
def test_an_error_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, message: str
) -> None:
    assert run(monkeypatch, *arguments) == code
    error = capsys.readouterr().err
    assert error.startswith(message)
    assert error.count("\n") == 1


def test_a_wrong_setting_is_a_usage_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "serve", HUB_SLOTS="many") == 2
    assert capsys.readouterr().err.startswith("error: HUB_SLOTS='many': Input should be a valid integer")


@pytest.mark.parametrize(
    "command",
    [
        *("", "serve", "demo", "train", "inspect", "register", "tasks", "classify"),
        *("gc", "admin-key", "top", "status", "tenants", "tenants create"),
        *("versions", "alias", "canary", "rollback", "settings", "share", "token", "usage", "download", "delete"),
    ],
)
def test_every_command_has_help(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    assert run(monkeypatch, *command.split(), "--help") == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("Usage: ")
    assert f"karst-hub {command}".strip() in first


def test_serve_ends_with_one_error_and_without_ray_when_the_backbone_cannot_be_loaded(tmp_path: Path) -> None:
    """In a process of its own: `serve` sets Ray's environment variables."""
    variables = {
        "HUB_HOME": str(tmp_path),
        "HUB_PORT": str(free_port()),
        "HUB_BACKBONE": "nonsense",
        "HF_HUB_OFFLINE": "1",
    }
    command = [str(Path(sys.executable).with_name("karst-hub")), "serve"]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "error: " in done.stderr
    assert "'nonsense'" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Ray" not in done.stderr


def test_an_adapter_that_is_not_better_than_chance_is_one_line_and_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    data = coloured_noise(tmp_path / "noise", dict.fromkeys(("a", "b"), (120, 120, 120)), 10, seed=5)
    output = tmp_path / "n.safetensors"
    arguments = ["train", str(data), "-o", str(output), "--recipe", "instant"]
    assert run(monkeypatch, *arguments, HUB_BACKBONE="demo") == 1
    printed = capsys.readouterr().err
    assert "not better than chance, so nothing is written" in printed
    assert printed.splitlines()[-1].startswith("error: The adapter is not clearly better than a constant answer")
    assert "Traceback" not in printed
    assert not output.exists()
