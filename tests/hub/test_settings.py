"""Settings: from the environment, refused by name, and never read at import."""

import os
import subprocess
import sys

import pytest
from pydantic import ValidationError

from hub.local.hub import free_port
from hub.settings import Settings


def test_settings_come_from_hub_variables(monkeypatch) -> None:
    monkeypatch.setenv("HUB_BACKBONE", "demo")
    monkeypatch.setenv("HUB_SLOTS", "3")
    settings = Settings()
    assert (settings.backbone, settings.slots, settings.host, settings.port) == ("demo", 3, "127.0.0.1", 8000)


def test_settings_are_frozen_and_checked() -> None:
    with pytest.raises(ValidationError, match=r"min_workers \(3\) is above max_workers \(2\)"):
        Settings(min_workers=3, max_workers=2)
    with pytest.raises(ValidationError, match=r"min_gateways \(2\) is above max_gateways \(1\)"):
        Settings(min_gateways=2)
    with pytest.raises(ValidationError):
        Settings().slots = 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tls_cert": "a.pem"}, "tls_cert and tls_key belong together"),
        ({"tls_key": "a.pem"}, "tls_cert and tls_key belong together"),
        ({"tls_client_ca": "a.pem"}, "tls_client_ca needs tls_cert, tls_key and haproxy"),
        ({"cors_origins": ("https://a.example/",)}, "'https://a.example/' is no origin"),
        ({"cors_origins": ("a.example",)}, "'a.example' is no origin"),
        ({"trusted_proxies": ("proxy",)}, "'proxy' does not appear to be an IPv4 or IPv6 network"),
        ({"trusted_proxies": ("10.0.0.1/8",)}, "10.0.0.1/8 has host bits set"),
    ],
)
def test_what_opens_the_hub_to_the_network_is_checked(settings, message) -> None:
    with pytest.raises(ValidationError, match=message):
        Settings(**settings)
    good = Settings(cors_origins=("https://a.example", "http://localhost:3000"), trusted_proxies=("10.0.0.1", "::1"))
    assert good.trusted_proxies == ("10.0.0.1/32", "::1/128")


def test_a_bad_setting_is_a_usage_error_that_names_it() -> None:
    done = karst_hub("serve", HUB_SLOTS="many")
    assert done.returncode == 2
    assert done.stderr.startswith("error: HUB_SLOTS='many': Input should be a valid integer")


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
def test_errors_are_one_line(arguments, code, message) -> None:
    done = karst_hub(*arguments)
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith(message), done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "command",
    [
        "",
        "serve",
        "demo",
        "train",
        "inspect",
        "register",
        "tasks",
        "classify",
        "gc",
        "admin-key",
        "top",
        "tenants",
        "tenants create",
    ],
)
def test_help_everywhere(command) -> None:
    done = karst_hub(*command.split(), "--help")
    assert done.returncode == 0
    assert "Usage: karst-hub" in done.stdout


def test_a_wrong_source_is_refused_at_the_start_without_its_password() -> None:
    done = karst_hub("serve", HUB_SOURCES='["https://user:secret@example.org/"]')
    assert done.returncode == 2
    assert done.stderr.startswith("error: HUB_SOURCES: ")
    assert "secret" not in done.stderr


def test_what_cannot_work_is_said_before_ray_starts(tmp_path) -> None:
    for variable, value, message in (
        ("HUB_SOURCES", '["s3://bucket/"]', "error: HUB_SOURCES: s3:// needs another package: Install s3fs"),
        ("HUB_CHECKPOINT", str(tmp_path / "no.safetensors"), "no.safetensors"),
        ("HUB_BACKBONE", "nonsense", "error: cannot load pretrained weights of backbone 'nonsense'"),
    ):
        environment = {"HUB_HOME": str(tmp_path), "HUB_PORT": str(free_port()), "HUB_BACKBONE": "demo", variable: value}
        done = karst_hub("serve", **environment)
        assert done.returncode == 1
        assert message in done.stderr, done.stderr
        assert "Traceback" not in done.stderr
        assert "Ray" not in done.stderr


def karst_hub(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [os.path.join(os.path.dirname(sys.executable), "karst-hub"), *arguments]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=120)
