"""Settings: read from the environment, checked, and refused with the name of the variable."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from hub.settings import InvalidSettings, Settings, load_settings

SETTINGS_PAGE = Path(__file__).parents[2] / "docs" / "settings.md"


def test_settings_come_from_hub_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HUB_BACKBONE", "demo")
    monkeypatch.setenv("HUB_SLOTS", "3")
    settings = load_settings()
    assert (settings.backbone, settings.slots, settings.host, settings.port) == ("demo", 3, "127.0.0.1", 8000)


def test_fixed_fields_override_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HUB_SLOTS", "3")
    assert load_settings(slots=4).slots == 4


def test_settings_cannot_be_changed() -> None:
    settings = Settings()
    with pytest.raises(ValidationError, match="frozen"):
        setattr(settings, "slots", 1)  # noqa: B010 (mypy refuses the assignment)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_workers": 3, "max_workers": 2}, r"HUB_MIN_WORKERS \(3\) must not exceed HUB_MAX_WORKERS \(2\)"),
        ({"min_gateways": 2}, r"HUB_MIN_GATEWAYS \(2\) must not exceed HUB_MAX_GATEWAYS \(1\)"),
        ({"tls_cert": "a.pem"}, "HUB_TLS_CERT and HUB_TLS_KEY must be set together"),
        ({"tls_key": "a.pem"}, "HUB_TLS_CERT and HUB_TLS_KEY must be set together"),
        ({"tls_client_ca": "a.pem"}, "HUB_TLS_CLIENT_CA requires HUB_TLS_CERT, HUB_TLS_KEY and HUB_HAPROXY=true"),
        ({"cors_origins": ("https://a.example/",)}, "HUB_CORS_ORIGINS=.*'https://a.example/' is not an origin"),
        ({"cors_origins": ("a.example",)}, "'a.example' is not an origin"),
        ({"trusted_proxies": ("proxy",)}, "HUB_TRUSTED_PROXIES=.*'proxy' does not appear to be an IPv4 or IPv6"),
        ({"trusted_proxies": ("10.0.0.1/8",)}, "10.0.0.1/8 has host bits set"),
        ({"slots": "many"}, "HUB_SLOTS='many': Input should be a valid integer"),
        ({"unknown": 1}, "HUB_UNKNOWN=1: Extra inputs are not permitted"),
    ],
)
def test_an_invalid_value_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidSettings, match=f"^{message}" if message.startswith("HUB") else message):
        load_settings(**settings)


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("HUB_SLOTS", "many", "HUB_SLOTS='many': Input should be a valid integer"),
        ("HUB_TRUSTED_PROXIES", "everybody", 'HUB_TRUSTED_PROXIES: expected JSON, such as ["a", "b"]'),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "smoke", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL='smoke': Input should be"),
    ],
)
def test_an_error_names_the_variable(monkeypatch: pytest.MonkeyPatch, variable: str, value: str, message: str) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(InvalidSettings) as error:
        load_settings()
    assert str(error.value).startswith(message)


def test_an_error_about_sources_does_not_show_a_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HUB_SOURCES", '["https://user:secret@example.org/"]')
    with pytest.raises(InvalidSettings, match=r"^HUB_SOURCES: ") as error:
        load_settings()
    assert "secret" not in str(error.value)


def test_origins_have_a_scheme_a_host_and_a_port() -> None:
    origins = ("https://a.example", "http://localhost:3000", "*")
    assert Settings(cors_origins=origins).cors_origins == origins


def test_trusted_proxies_are_networks() -> None:
    assert Settings(trusted_proxies=("10.0.0.1", "::1")).trusted_proxies == ("10.0.0.1/32", "::1/128")


def test_the_settings_page_has_every_variable() -> None:
    page = SETTINGS_PAGE.read_text()
    fields = set(Settings.model_fields) - {"traces_exporter", "otlp_protocol"}
    assert {name for name in fields if f"`HUB_{name.upper()}`" not in page} == set()
    assert "`OTEL_TRACES_EXPORTER`" in page


def test_a_user_without_a_home_folder_must_set_hub_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("HUB_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(InvalidSettings, match=r"no home folder\. Set HUB_HOME"):
        load_settings()
    monkeypatch.setenv("HUB_HOME", "/srv/hub")
    assert load_settings().home == Path("/srv/hub")


def test_int8_takes_the_cpu_and_refuses_a_gpu() -> None:
    settings = load_settings(dtype="int8")
    assert (settings.torch_device, settings.weights_dtype) == ("cpu", "float32")
    with pytest.raises(InvalidSettings, match="HUB_DTYPE=int8 runs on CPUs only, but HUB_DEVICE=cuda"):
        load_settings(dtype="int8", device="cuda")
