"""All options of a hub, read from `HUB_*` environment variables. No other module reads the environment."""

import re
from ipaddress import ip_network
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import AliasChoices, Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError

DEFAULT_BACKBONE = "vit_base_patch16_224.augreg_in21k"


class InvalidSettings(ValueError):
    """An environment variable has a value that the hub cannot use; the message names the variable."""


def _default_home() -> Path:
    try:
        return Path.home() / ".karst-hub"
    except RuntimeError:  # neither HOME nor an entry in the password database
        raise InvalidSettings("This user has no home folder. Set HUB_HOME to a writable folder.") from None


class Settings(BaseSettings):
    """Settings of one hub; frozen. `HUB_SLOTS` sets field `slots`, and so on."""

    model_config = SettingsConfigDict(
        env_prefix="HUB_", frozen=True, extra="forbid", populate_by_name=True, hide_input_in_errors=True
    )

    backbone: str = Field(DEFAULT_BACKBONE, description="timm name, `hf-hub:...`, `local-dir:...`, or `demo`")
    checkpoint: Path | None = Field(None, description="local weights: .safetensors, .pth or Google .npz")
    image_size: int | None = Field(None, ge=1, description="side of the backbone's images in pixels; unset: its own")
    device: str = Field("auto", description="torch device of a worker; `auto`: cuda if available, otherwise cpu")
    dtype: Literal["float32", "bfloat16", "float16", "int8"] = Field(
        "float32", description="dtype of weights and activations; `int8`: frozen layers in int8, all else float32"
    )
    slots: int = Field(64, ge=1, description="adapters in a worker's device memory")
    max_rank: int = Field(16, ge=1, description="largest rank of an adapter")
    max_kernels: int = Field(8, ge=1, description="largest number of kernels of an adapter")
    host_cache_bytes: int = Field(
        1024**3,
        ge=0,
        description="host memory per worker for adapters without a slot; "
        "stacked heads of calls for many tasks take up to a quarter as much besides",
    )
    pinned: tuple[str, ...] = Field((), description="`tenant/task` or `tenant/task@alias`: adapters that keep a slot")
    batch_size: int = Field(32, ge=1, description="largest forward pass, in images; a worker may choose less")
    batch_wait_ms: float = Field(2.0, ge=0, description="longest wait of a forward pass for more images")
    min_workers: int = Field(1, ge=0, description="least number of workers; 0: the first request starts one")
    max_workers: int = Field(1, ge=1, description="largest number of workers")
    min_gateways: int = Field(1, ge=1, description="least number of gateways")
    max_gateways: int = Field(1, ge=1, description="largest number of gateways")
    scale_up_s: float = Field(10.0, ge=1, description="seconds of overload before replicas start")
    scale_down_s: float = Field(300.0, ge=1, description="seconds of underload before replicas stop")
    max_trainings: int = Field(1, ge=1, description="trainings as jobs that the hub runs at once")
    training_cpus: int = Field(1, ge=1, description="CPUs of one training, and threads of torch in it")
    training_gpus: float = Field(0, ge=0, description="GPUs of one training, or a share of one; 0: the CPU")
    # No repr: the URLs may contain passwords.
    redis_url: str | None = Field(
        None, repr=False, description="registry; unset: an embedded redis-server under HUB_HOME"
    )
    store_url: str | None = Field(
        None, repr=False, description="adapter files, any fsspec URL; unset: a folder under HUB_HOME"
    )
    min_free_disk: int = Field(
        512 * 1024**2, ge=0, description="bytes that uploads leave free on the disks of the store and of uploads"
    )
    audit_days: int = Field(90, ge=1, description="days that the audit keeps an entry")
    gc_interval_s: int = Field(3600, ge=0, description="seconds between two garbage collections; 0: only by command")
    gc_age_s: int = Field(3600, ge=60, description="seconds since its last write before a collection removes a file")
    home: Path = Field(default_factory=_default_home, description="folder of this machine's registry, store and logs")
    host: str = Field("127.0.0.1", description="address that HTTP listens on")
    port: int = Field(8000, ge=1, le=65535, description="port that HTTP listens on")
    cors_origins: tuple[str, ...] = Field((), description="web origins that browsers may call the hub from")
    haproxy: bool = Field(True, description="use HAProxy and Serve's throughput switches; false: Serve's own proxy")
    tls_cert: Path | None = Field(None, description="HTTPS: certificate with its chain, PEM file")
    tls_key: Path | None = Field(None, description="HTTPS: private key without a password, PEM file")
    tls_client_ca: Path | None = Field(None, description="HTTPS: authorities of required client certificates, PEM file")
    trusted_proxies: tuple[str, ...] = Field((), description="reverse proxies whose `X-Forwarded-For` the hub trusts")
    sources: tuple[str, ...] = Field((), description="allowed prefixes of adapters by reference: `s3://bucket/dir/`")
    log_format: Literal["json", "text"] = Field("json", description="format of gateways' and workers' log lines")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="least severe level that is logged; `debug` adds a line per request"
    )
    metrics_port: int | None = Field(
        None, ge=1, le=65535, description="port of this machine's metrics; unset: no metrics"
    )
    # OpenTelemetry's own variables; its library reads the others.
    traces_exporter: str = Field(
        "none",
        validation_alias="OTEL_TRACES_EXPORTER",
        description="exporter of traces: `otlp`, `console`, or `none`",
    )
    otlp_protocol: Literal["http/protobuf", "grpc"] = Field(
        "http/protobuf",
        validation_alias=AliasChoices("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"),
        description="protocol of the `otlp` exporter",
    )
    max_image_bytes: int = Field(10 * 1024**2, ge=1, description="largest encoded image")
    max_image_pixels: int = Field(50_000_000, ge=1, description="largest decoded image")
    max_adapter_bytes: int = Field(64 * 1024**2, ge=1, description="largest adapter file")

    @field_validator("redis_url", "store_url")
    @classmethod
    def _take_empty_as_unset(cls, url: str | None) -> str | None:
        return url or None

    @field_validator("home")
    @classmethod
    def _make_absolute(cls, home: Path) -> Path:
        return home.expanduser().resolve()

    @field_validator("sources")
    @classmethod
    def _check_sources(cls, sources: tuple[str, ...]) -> tuple[str, ...]:
        from .storage.remote_sources import parse_prefixes  # the command line starts faster without fsspec

        parse_prefixes(sources)
        return sources

    @field_validator("cors_origins")
    @classmethod
    def _check_origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:
            if origin != "*" and not re.fullmatch(r"https?://[a-z0-9.\-\[\]:]+", origin):
                raise ValueError(f"{origin!r} is not an origin; use scheme, host and port, such as https://a.example")
        return origins

    @field_validator("trusted_proxies")
    @classmethod
    def _parse_networks(cls, proxies: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(str(ip_network(proxy)) for proxy in proxies)

    @model_validator(mode="after")
    def _check_tls(self) -> Self:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("HUB_TLS_CERT and HUB_TLS_KEY must be set together, or neither")
        if self.tls_client_ca is not None and (self.tls_cert is None or not self.haproxy):
            raise ValueError("HUB_TLS_CLIENT_CA requires HUB_TLS_CERT, HUB_TLS_KEY and HUB_HAPROXY=true")
        return self

    @model_validator(mode="after")
    def _check_int8(self) -> Self:
        if self.dtype == "int8" and self.device not in ("auto", "cpu"):
            raise ValueError(
                f"HUB_DTYPE=int8 runs on CPUs only, but HUB_DEVICE={self.device}. "
                "Set HUB_DEVICE=cpu, or HUB_DTYPE=bfloat16"
            )
        return self

    @model_validator(mode="after")
    def _check_bounds(self) -> Self:
        for kind in ("workers", "gateways"):
            minimum, maximum = getattr(self, f"min_{kind}"), getattr(self, f"max_{kind}")
            if minimum > maximum:
                raise ValueError(
                    f"HUB_MIN_{kind.upper()} ({minimum}) must not exceed HUB_MAX_{kind.upper()} ({maximum})"
                )
        return self

    @property
    def max_request_bytes(self) -> int:
        """Largest classification request, in bytes: four images of the largest size."""
        return 4 * self.max_image_bytes

    @property
    def torch_device(self) -> str:
        """`device`, with `auto` resolved on this machine; a CPU for int8."""
        if self.device != "auto":
            return self.device
        if self.dtype == "int8":
            return "cpu"
        import torch  # the command line starts faster without torch

        return "cuda" if torch.cuda.is_available() else "cpu"

    @property
    def weights_dtype(self) -> str:
        """torch's name of the dtype that the backbone is loaded in; int8 layers are made from float32."""
        return "float32" if self.dtype == "int8" else self.dtype


def load_settings(**fixed: Any) -> Settings:
    """Return the settings of the environment.

    Args:
        fixed: fields that do not come from the environment.

    Raises:
        InvalidSettings: a variable's value is not valid.
    """
    try:
        return Settings(**fixed)
    except ValidationError as error:
        first = error.errors()[0]
        message = first["msg"].removeprefix("Value error, ")
        if not first["loc"]:
            raise InvalidSettings(message) from error
        name = str(first["loc"][0])
        secret = name in ("sources", "redis_url", "store_url")  # a URL may contain a password
        value = "" if secret else f"={first['input']!r}"
        variable = name if name.isupper() else f"HUB_{name.upper()}"
        raise InvalidSettings(f"{variable}{value}: {message}") from error
    except SettingsError as error:  # the value of a list is not JSON
        field = re.search(r'"(\w+)"', str(error))
        raise InvalidSettings(f'HUB_{field[1].upper() if field else "*"}: expected JSON, such as ["a", "b"]') from error
