"""Every option of a hub, read from `HUB_*` environment variables in one place; nothing else reads them."""

import re
from ipaddress import ip_network
from pathlib import Path
from typing import Literal

from pydantic import AliasChoices, Field, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

DEFAULT_BACKBONE = "vit_base_patch16_224.augreg_in21k"


class Settings(BaseSettings):
    """The settings of one hub; frozen. Field `slots` is set by `HUB_SLOTS`, and so on."""

    model_config = SettingsConfigDict(env_prefix="HUB_", frozen=True, extra="forbid", populate_by_name=True)

    backbone: str = Field(DEFAULT_BACKBONE, description="timm name, `hf-hub:...`, `local-dir:...`, or `demo`")
    checkpoint: Path | None = Field(None, description="local weights: .safetensors, .pth or Google .npz")
    device: str = Field("auto", description="torch device of a worker; `auto` is cuda where there is one, else cpu")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="of weights and activations")
    slots: int = Field(64, ge=1, description="adapters in a worker's bank at once")
    max_rank: int = Field(16, ge=1, description="largest rank of an adapter")
    max_kernels: int = Field(8, ge=1, description="largest number of kernels of an adapter")
    host_cache_bytes: int = Field(1024**3, ge=0, description="host memory for adapters that lost their slot")
    pinned: tuple[str, ...] = Field((), description="`tenant/task` or `tenant/task@alias` that always keep a slot")
    batch_size: int = Field(32, ge=1, description="most images in a pass; a worker takes fewer if that is as fast")
    batch_wait_ms: float = Field(2.0, ge=0, description="longest wait of a pass for more images")
    min_workers: int = Field(1, ge=0, description="workers that are always there; 0: the first request starts one")
    max_workers: int = Field(1, ge=1, description="workers under load")
    min_gateways: int = Field(1, ge=1, description="gateways that are always there")
    max_gateways: int = Field(1, ge=1, description="gateways under load")
    scale_up_s: float = Field(10.0, ge=1, description="how long there must be too few of them before more start")
    scale_down_s: float = Field(300.0, ge=1, description="how long there must be too many of them before some stop")
    redis_url: str | None = Field(None, description="registry; unset: an embedded redis-server under HUB_HOME")
    store_url: str | None = Field(None, description="adapter files, any fsspec URL; unset: a folder under HUB_HOME")
    home: Path = Field(Path.home() / ".karst-hub", description="what this machine keeps: registry, store, logs")
    host: str = Field("127.0.0.1", description="address that HTTP binds")
    port: int = Field(8000, ge=1, le=65535)
    cors_origins: tuple[str, ...] = Field((), description="web sites whose pages may call the hub: `https://a.example`")
    haproxy: bool = Field(True, description="Serve's HAProxy and throughput switches; false: its stock proxy")
    tls_cert: Path | None = Field(None, description="HTTPS: the certificate with its chain (PEM)")
    tls_key: Path | None = Field(None, description="HTTPS: the certificate's key (PEM, without a password)")
    tls_client_ca: Path | None = Field(None, description="HTTPS: only clients with a certificate of these (PEM)")
    trusted_proxies: tuple[str, ...] = Field((), description="addresses or networks whose `X-Forwarded-For` is true")
    sources: tuple[str, ...] = Field((), description="prefixes that adapters may be fetched from: `s3://bucket/dir/`")
    log_format: Literal["json", "text"] = Field("json", description="of gateways' and workers' logs")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="debug: a line a request")
    metrics_port: int | None = Field(
        None, ge=1, le=65535, description="where this machine's metrics are; unset: any free port"
    )
    # OpenTelemetry's own names; its other variables are read by its own code.
    traces_exporter: str = Field(
        "none",
        validation_alias="OTEL_TRACES_EXPORTER",
        description="`otlp`, `console`, or `none`: nothing is traced",
    )
    otlp_protocol: Literal["http/protobuf", "grpc"] = Field(
        "http/protobuf",
        validation_alias=AliasChoices("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"),
        description="how `otlp` is sent",
    )
    max_image_bytes: int = Field(10 * 1024**2, ge=1, description="one encoded image")
    max_image_pixels: int = Field(50_000_000, ge=1, description="one decoded image")
    max_adapter_bytes: int = Field(64 * 1024**2, ge=1, description="one adapter file")

    @field_validator("home")
    @classmethod
    def _absolute(cls, home: Path) -> Path:
        return home.expanduser().resolve()

    @field_validator("sources")
    @classmethod
    def _prefixes(cls, sources: tuple[str, ...]) -> tuple[str, ...]:
        from .storage.remote_sources import parse_prefixes  # the command line starts quicker without fsspec

        parse_prefixes(sources)
        return sources

    @field_validator("cors_origins")
    @classmethod
    def _origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:
            if origin != "*" and not re.fullmatch(r"https?://[a-z0-9.\-\[\]:]+", origin):
                raise ValueError(f"{origin!r} is no origin, such as https://a.example or http://localhost:3000")
        return origins

    @field_validator("trusted_proxies")
    @classmethod
    def _networks(cls, proxies: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(str(ip_network(proxy)) for proxy in proxies)

    @model_validator(mode="after")
    def _whole_tls(self) -> "Settings":
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key belong together: set both, or neither")
        if self.tls_client_ca is not None and (self.tls_cert is None or not self.haproxy):
            raise ValueError("tls_client_ca needs tls_cert, tls_key and haproxy")
        return self

    @model_validator(mode="after")
    def _in_order(self) -> "Settings":
        for kind in ("workers", "gateways"):
            least, most = getattr(self, f"min_{kind}"), getattr(self, f"max_{kind}")
            if least > most:
                raise ValueError(f"min_{kind} ({least}) is above max_{kind} ({most})")
        return self

    @property
    def max_request_bytes(self) -> int:
        """A whole classification request: room for four images of the largest size."""
        return 4 * self.max_image_bytes

    @property
    def torch_device(self) -> str:
        """`device`, with `auto` decided on the machine that asks."""
        if self.device != "auto":
            return self.device
        import torch  # only workers ask; the command line starts quicker without torch

        return "cuda" if torch.cuda.is_available() else "cpu"
