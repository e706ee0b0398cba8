"""Fixture of tests that run commands against the hub's application."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from hub.cli.main import app
from hub.cli.output import out
from tests.support.hub_app import Hub

Run = Callable[..., Result]
COLOURS = {"red": (220, 40, 40), "blue": (40, 60, 220)}


@pytest.fixture
def run(hub: Hub, url: str, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Function that runs a command with an owner key in the environment."""
    monkeypatch.setenv("HUB_URL", url)
    monkeypatch.setenv("HUB_KEY", hub.key)
    monkeypatch.setattr(out, "width", 200)
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


def read(done: Result) -> Any:
    assert done.exit_code == 0, done.output or done.exception
    return json.loads(done.stdout)
