"""Cost of traces, metrics and log lines for a gateway: CPU time per request.

    python -m benchmarks.tracing [--rounds 15] [--requests 200] [--output FILE]

One gateway's whole application classifies one small image per request, in this process, over a real registry. The
workers are a stand-in that answers at once, so the figures are the gateway's own work. These cases take turns in every
round:
- everything off
- metrics (`GatewayMetrics`, recorded outside of Ray's exporter)
- one debug line per request
- traces on, but not sampled
- traces of every request with the worker's part, and an exporter that drops them. This is the cost without the
  network; a separate thread sends each batch of spans.

Figures are medians over rounds with quartiles: milliseconds of this process's CPU time per request, and the difference
to everything off in the same round.
"""

import argparse
import asyncio
import io
import json
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON
from PIL import Image

from adapters import Backbone, BankLimits, KarstConfig, load_backbone
from hub.admin_schemas import LimitsChange
from hub.api.app import create_app
from hub.local.bootstrap import create_first_keys
from hub.local.embedded_redis import embedded_redis
from hub.observability import request_context, tracing
from hub.observability.log_format import JsonFormatter
from hub.observability.request_context import RequestContext
from hub.observability.request_log import RequestLogMiddleware
from hub.registry.keys import KeyRegistry
from hub.registry.redis.connection import RegistryConnection
from hub.registry.tenants import TenantRegistry
from hub.settings import Settings
from hub.worker_api import Answer, PassStats

from .common import machine, markdown_table, random_adapter, spread

OUTPUT = Path(__file__).parent / "results" / "tracing.json"
WARM_UP_ROUNDS = 2
NOTHING = "nothing"


class Instant:
    """`service.Workers` without computation, which reports its passes as a worker does."""

    def __init__(self, limits: BankLimits, classes: int) -> None:
        self._limits = limits
        self._row = np.full(classes, 1 / classes, np.float32)

    async def limits(self) -> BankLimits:
        return self._limits

    async def prefetch(self, digest: str) -> None:
        pass

    async def classify(
        self, tenant: str, digest: str, images: Sequence[np.ndarray], weight: float, *, idle: bool = False
    ) -> list[Answer]:
        with tracing.worker_call_span(len(images)):
            origin = request_context.call_origin()
            if origin.traceparent:
                calls = {origin.traceparent: (0.0, 0.1)}
                tracing.record_pass(calls, worker="w", images=len(images), tasks=1, compute_ms=1.0)
            return [Answer(self._row, PassStats("w", len(images), 1, 0.0, 0.1, 1.0)) for _ in images]


class Dropped(SpanExporter):
    def export(self, spans: Sequence[Any]) -> SpanExportResult:
        return SpanExportResult.SUCCESS

    def shutdown(self) -> None:
        pass


class Switch:
    """`RequestMetrics` that can be switched off."""

    def __init__(self) -> None:
        from hub.cluster.gateway_metrics import GatewayMetrics
        from hub.cluster.ray_compat import ray_metrics

        self._meter = GatewayMetrics(ray_metrics())
        self.on = False

    def record(self, context: RequestContext, status: int, seconds: float) -> None:
        if self.on:
            self._meter.record(context, status, seconds)

    def record_registry(self, refuses_changes: bool) -> None:
        self._meter.record_registry(refuses_changes)


def main() -> None:
    """Measure, print a table, write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=15, help="how often each way runs")
    parser.add_argument("--requests", type=int, default=200, help="in a round, a way")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="where the JSON goes")
    options = parser.parse_args()

    rows = asyncio.run(measure(load_backbone("demo"), options.rounds, options.requests))
    cells = [
        [row["way"], f"{row['ms']['median']:.3f}", "{median:+.3f} [{q1:+.3f}, {q3:+.3f}]".format(**row["more_ms"])]
        for row in rows
    ]
    print(markdown_table(["way", "ms a request", "more than nothing"], cells))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=2) + "\n")
    print(f"written to {options.output}")


async def measure(backbone: Backbone, rounds: int, requests: int) -> list[dict[str, Any]]:
    """Return the milliseconds of CPU time per request, for each case."""
    adapter = random_adapter(backbone, KarstConfig(kernels=2))
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        url = stack.enter_context(embedded_redis(folder))
        settings = Settings(backbone="demo", redis_url=url, store_url=str(folder / "store"), home=folder)
        key = await owner(url)
        meter = Switch()
        api = create_app(settings, Instant(_limits(backbone), adapter.num_classes))
        app = RequestLogMiddleware(api, meter)
        ways = _ways(meter)
        async with (
            api.router.lifespan_context(api),
            httpx.AsyncClient(
                transport=httpx.ASGITransport(app), base_url="http://hub", headers={"authorization": f"Bearer {key}"}
            ) as http,
        ):
            done = await http.post("/v1/tasks/digits/versions", content=adapter.data)
            assert done.status_code == 201, done.text
            taken: dict[str, list[float]] = {name: [] for name in ways}
            for i in range(rounds + WARM_UP_ROUNDS):
                for name in [*ways][i % len(ways) :] + [*ways][: i % len(ways)]:  # no case always comes first
                    switch = ways[name]
                    switch(True)
                    ms = await _round(http, requests)
                    switch(False)
                    if i >= WARM_UP_ROUNDS:
                        taken[name].append(ms)
    plain = taken[NOTHING]
    return [
        {"way": name, "ms": spread(ms), "more_ms": spread([a - b for a, b in zip(ms, plain, strict=True)])}
        for name, ms in taken.items()
    ]


def _ways(meter: Switch) -> dict[str, Callable[[bool], None]]:
    unsampled, sampled = TracerProvider(ALWAYS_OFF), TracerProvider(ALWAYS_ON)
    for provider in (unsampled, sampled):
        provider.add_span_processor(BatchSpanProcessor(Dropped()))
    lines = logging.getLogger("hub.requests")
    handler = logging.StreamHandler(io.StringIO())
    handler.setFormatter(JsonFormatter())

    def counted(on: bool) -> None:
        meter.on = on

    def logged(on: bool) -> None:
        lines.setLevel(logging.DEBUG if on else logging.NOTSET)
        (lines.addHandler if on else lines.removeHandler)(handler)
        handler.setStream(io.StringIO())

    return {
        NOTHING: lambda _on: None,
        "metrics": counted,
        "a line a request": logged,
        "traces, none sampled": lambda on: tracing.use_provider(unsampled if on else None),
        "traces, all sampled": lambda on: tracing.use_provider(sampled if on else None),
    }


async def _round(http: httpx.AsyncClient, requests: int) -> float:
    image = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(image, "PNG")
    began = time.process_time()
    for _ in range(requests):
        answer = await http.post("/v1/tasks/digits/classify", content=image.getvalue())
        if answer.status_code != 200:
            sys.exit(answer.text)
    return (time.process_time() - began) * 1000 / requests


async def owner(url: str) -> str:
    """Return an owner's key of the new registry's tenant, whose rate limits are above every load."""
    from hub.registry.audit import OPERATOR

    database = RegistryConnection(url)
    try:
        keys = await create_first_keys(TenantRegistry(database), KeyRegistry(database))
        assert keys.owner is not None
        rates = LimitsChange(requests_per_second=1e6, images_per_second=1e6)
        await TenantRegistry(database).change_limits(OPERATOR, "default", rates)
        return keys.owner
    finally:
        await database.close()


def _limits(backbone: Backbone) -> BankLimits:
    from adapters import Bank

    return Bank(backbone, slots=1, max_rank=16, max_kernels=8).limits


if __name__ == "__main__":
    main()
