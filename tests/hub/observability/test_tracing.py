"""Traces of requests, workers and shared forward passes; no import of OpenTelemetry while traces are off."""

import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from adapters import Adapter
from hub.observability import log_format, request_context, tracing
from hub.observability.tracing import TracingError
from tests.support.hub_app import Hub
from tests.support.models import png
from tests.support.workers import fix_batch_size, make_worker

Spans = Callable[[], dict[str, list[Any]]]
PARENT = "00-" + "1" * 32 + "-" + "2" * 16 + "-01"


@pytest.fixture
def spans() -> Iterator[Spans]:
    """A function that returns the finished spans by name."""
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracing.use_provider(provider)

    def finished() -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {}
        for span in exporter.get_finished_spans():
            found.setdefault(span.name, []).append(span)
        return found

    yield finished
    tracing.stop()


def test_opentelemetry_is_not_imported_when_traces_are_off() -> None:
    code = (
        "import sys; from hub.observability import request_log, tracing; tracing.start('none')\n"
        "with tracing.span('a'), tracing.worker_call_span(1), tracing.request_span(b'', 'GET') as span:\n"
        "    assert span is None\n"
        "assert tracing.traceparent() == ''\n"
        "tracing.record_pass({}, worker='w', images=1, tasks=1, compute_ms=1.0); tracing.stop()\n"
        "print([m for m in sys.modules if m.startswith('opentelemetry')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n", done.stderr


def test_start_raises_an_error_when_the_exporter_is_not_installed() -> None:
    with pytest.raises(TracingError, match=r"OTEL_TRACES_EXPORTER=smoke.*karst-hub\[otel\]"):
        tracing.start("smoke")


def test_spans_are_printed_when_the_exporter_is_console() -> None:
    code = (
        "from hub.observability import tracing; tracing.start('console')\n"
        "with tracing.request_span(b'', 'GET'): pass\n"
        "tracing.stop()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    printed = json.loads(done.stdout)
    assert printed["name"] == "request"
    assert printed["resource"]["attributes"]["service.name"] == "karst-hub"


def test_spans_are_sent_to_the_collector_of_the_otel_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="karst-hub[otel] is not installed")
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    received: list[ExportTraceServiceRequest] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            assert self.path == "/v1/traces"
            received.append(ExportTraceServiceRequest.FromString(body))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Collector) as collector:
        thread = threading.Thread(target=collector.serve_forever)
        thread.start()
        try:
            monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.server_port}")
            monkeypatch.setenv("OTEL_SERVICE_NAME", "mine")
            tracing.start("otlp")
            with tracing.request_span(b"", "GET"), tracing.span("decode", images=2):
                pass
            tracing.stop()
        finally:
            collector.shutdown()
            thread.join()
    (resource,) = received[0].resource_spans
    assert {a.key: a.value.string_value for a in resource.resource.attributes}["service.name"] == "mine"
    assert {span.name for scope in resource.scope_spans for span in scope.spans} == {"request", "decode"}


def test_a_request_is_a_span_in_the_clients_trace(hub: Hub, adapters: list[Adapter], spans: Spans) -> None:
    hub.http.post("/v1/tasks/digits/versions", content=adapters[0].data)
    reply = hub.http.post("/v1/tasks/digits/classify", content=png(0), headers={"traceparent": PARENT})
    assert reply.status_code == 200
    found = spans()
    request, decode = found["request"][-1], found["decode"][-1]
    assert f"{request.context.trace_id:032x}" == "1" * 32
    assert f"{request.parent.span_id:016x}" == "2" * 16
    assert decode.parent.span_id == request.context.span_id
    assert request.attributes["http.route"] == "/v1/tasks/{task}/classify"
    assert request.attributes["http.response.status_code"] == 200
    assert request.attributes["karst.tenant"] == "default"
    assert request.attributes["karst.task"] == "digits"
    assert request.attributes["karst.request_id"] == reply.headers["x-request-id"]


def test_the_span_of_a_failed_request_has_the_error_code(hub: Hub, spans: Spans) -> None:
    hub.http.post("/v1/tasks/absent/classify", content=png(0), headers={"traceparent": "nonsense"})
    (request,) = spans()["request"]
    assert request.parent is None
    assert request.attributes["error.type"] == "not-found"


def test_a_forward_pass_is_in_one_trace_and_links_to_the_others(spans: Spans) -> None:
    parents = []
    for _ in range(3):
        with tracing.request_span(b"", "GET"), tracing.worker_call_span(2):
            parents.append(tracing.traceparent())
    calls = {parent: (2.0 * i, 3.0) for i, parent in enumerate(parents)}
    tracing.record_pass(calls, worker="w", images=6, tasks=2, compute_ms=5.0)
    found = spans()
    (forward_pass,) = found["pass"]
    traces = {f"{s.context.trace_id:032x}" for s in found["request"]}
    assert len(traces) == 3
    assert f"{forward_pass.context.trace_id:032x}" == parents[0][3:35]
    assert {f"{link.context.trace_id:032x}" for link in forward_pass.links} == traces - {parents[0][3:35]}
    assert dict(forward_pass.attributes) == {"karst.worker": "w", "karst.images": 6, "karst.tasks": 2}
    assert len(found["compute"]) == 2
    for compute in found["compute"]:
        assert [link.context.span_id for link in compute.links] == [forward_pass.context.span_id]
    for queue in found["queue"]:
        assert queue.end_time == forward_pass.start_time
        assert queue.end_time - queue.start_time == 3_000_000
    assert sorted(load.end_time - load.start_time for load in found["load"]) == [0, 2_000_000, 4_000_000]


def test_a_call_has_no_traceparent_when_its_request_is_not_sampled(spans: Spans) -> None:
    with tracing.request_span(PARENT[:-1].encode() + b"0", "GET"):
        assert tracing.traceparent() == ""
        assert request_context.call_origin().traceparent == ""


@pytest.mark.filterwarnings("ignore")  # warnings of Ray's import
def test_a_worker_records_spans_of_traced_calls_only(
    empty_redis: str, tmp_path: Path, adapters: list[Adapter], spans: Spans, monkeypatch: pytest.MonkeyPatch
) -> None:
    import numpy as np

    from hub.storage.store import Store

    fix_batch_size(monkeypatch)
    monkeypatch.setattr(log_format, "start", lambda *_: None)
    store = Store(str(tmp_path))
    for adapter in adapters[:2]:
        store.put(adapter.digest, adapter.data)
    worker = make_worker(empty_redis, store, tmp_path)
    image = np.zeros((3, 32, 32), np.uint8)

    async def one(digest: str, traced: bool) -> str:
        if not traced:
            await worker.classify("t", digest, [image])
            return ""
        with tracing.request_span(b"", "POST"), tracing.worker_call_span(1):
            origin = request_context.call_origin()
            await worker.classify("t", digest, [image], 1.0, origin)
            return origin.traceparent

    async def use() -> tuple[str, str, str]:
        await one(adapters[0].digest, False)
        await one(adapters[1].digest, False)
        return await asyncio.gather(
            one(adapters[0].digest, True), one(adapters[1].digest, True), one(adapters[1].digest, False)
        )

    first, second, _ = asyncio.run(use())
    found = spans()
    assert sum(p.attributes["karst.images"] for p in found["pass"]) >= 2
    assert {f"{s.context.trace_id:032x}" for s in found["queue"]} == {first[3:35], second[3:35]}
