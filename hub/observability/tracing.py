"""OpenTelemetry traces: the request, decoding, the call to a worker, and the worker's load, queue and forward pass.

Without `start`, traces are off and OpenTelemetry is not imported. OpenTelemetry itself reads exporter and sampler from
`OTEL_*`; this module does not read the environment. One forward pass computes images of many requests. Its span belongs
to the trace of one request and links to the others; each of the others links back.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span, SpanContext, Tracer

    from .request_context import RequestContext

OTLP_EXPORTERS = {"http/protobuf": "otlp_proto_http", "grpc": "otlp_proto_grpc"}
SERVICE = "karst-hub"

_provider: "TracerProvider | None" = None
_tracer: "Tracer | None" = None
_NO_SPAN = nullcontext()


class TracingError(ValueError):
    """The chosen exporter is not installed."""


def start(exporter: str, protocol: str = "http/protobuf") -> None:
    """Start to trace in this process. A second call changes nothing.

    Args:
        exporter: `none`, `otlp`, `console`, or another installed exporter of OpenTelemetry.
        protocol: transport of `otlp`: `http/protobuf` or `grpc`.

    Raises:
        TracingError: the exporter is not installed.
    """
    if exporter == "none" or _provider is not None:
        return
    name = OTLP_EXPORTERS.get(protocol, protocol) if exporter == "otlp" else exporter
    try:
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        (found,) = list(entry_points(group="opentelemetry_traces_exporter", name=name))[:1]
        kind = found.load()
    except (ImportError, ValueError) as error:
        raise TracingError(
            f"OTEL_TRACES_EXPORTER={exporter}: the exporter {name!r} is not installed; pip install 'karst-hub[otel]'"
        ) from error
    resource = Resource.create()
    if str(resource.attributes[SERVICE_NAME]).startswith("unknown_service"):  # OTEL_SERVICE_NAME is unset
        resource = resource.merge(Resource({SERVICE_NAME: SERVICE}))
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)  # reads sampler and limits from OTEL_*
    provider.add_span_processor(BatchSpanProcessor(kind()))
    use_provider(provider)


def use_provider(provider: "TracerProvider | None") -> None:
    """Trace with this provider; None turns traces off."""
    global _provider, _tracer
    _provider, _tracer = provider, provider.get_tracer(SERVICE) if provider is not None else None


def stop() -> None:
    """Send the remaining spans and turn traces off."""
    if _provider is not None:
        _provider.shutdown()
    use_provider(None)


def span(name: str, **attributes: str | int | float) -> AbstractContextManager[Any]:
    """Return a context manager around a child of the current span. It yields the span; None while traces are off."""
    if _tracer is None:
        return _NO_SPAN
    return _tracer.start_as_current_span(name, attributes={f"karst.{k}": v for k, v in attributes.items()})


def request_span(traceparent: bytes, method: str) -> AbstractContextManager["Span | None"]:
    """Return the span of an HTTP request. It continues the client's trace if `traceparent` (W3C) is valid."""
    if _tracer is None:
        return _NO_SPAN
    from opentelemetry.trace import SpanKind

    return _tracer.start_as_current_span(
        "request",
        context=_context(traceparent.decode("latin-1")),
        kind=SpanKind.SERVER,
        attributes={"http.request.method": method},
    )


@contextmanager
def worker_call_span(images: int) -> Iterator[None]:
    """Trace a gateway's call to a worker."""
    if _tracer is None:
        yield
        return
    from opentelemetry.trace import SpanKind

    with _tracer.start_as_current_span("worker", kind=SpanKind.CLIENT, attributes={"karst.images": images}):
        yield


def set_request_attributes(span: "Span", route: str, status: int, context: "RequestContext") -> None:
    """Set the attributes of a request's span at its end. A status of 500 or above marks the span as failed."""
    from opentelemetry.trace import Status, StatusCode

    if not span.is_recording():
        return
    attributes: dict[str, str | int] = {
        "http.route": route,
        "http.response.status_code": status,
        "error.type": context.error,
        "karst.request_id": context.request_id,
        "karst.tenant": context.tenant,
        "karst.task": context.task,
        "karst.version": context.version or "",
    }
    span.set_attributes({name: value for name, value in attributes.items() if value != ""})
    if status >= 500:
        span.set_status(Status(StatusCode.ERROR))


def traceparent() -> str:
    """Return the current span in W3C form, for a call to another process; "" if the span is not sampled."""
    if _tracer is None:
        return ""
    from opentelemetry.trace import get_current_span

    context = get_current_span().get_span_context()
    if not context.is_valid or not context.trace_flags.sampled:
        return ""
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-01"


def record_pass(
    calls: Mapping[str, tuple[float, float]], *, worker: str, images: int, tasks: int, compute_ms: float
) -> None:
    """Record the spans of a forward pass that has just ended, and of the load, queue and compute of each traced call.

    Args:
        calls: traceparent -> (milliseconds of load, milliseconds in the queue). Calls without a traceparent are left
            out.
    """
    if _tracer is None or not calls:
        return
    from opentelemetry.trace import Link

    end = time.time_ns()
    start = end - int(compute_ms * 1e6)
    contexts = {parent: _context(parent) for parent in calls}
    first, *others = calls
    forward_pass = _tracer.start_span(
        "pass",
        context=contexts[first],
        start_time=start,
        links=[Link(_span_context(contexts[parent])) for parent in others],
        attributes={"karst.worker": worker, "karst.images": images, "karst.tasks": tasks},
    )
    forward_pass.end(end)
    link = [Link(forward_pass.get_span_context())]
    for parent, (load_ms, queue_ms) in calls.items():
        queue_start = start - int(queue_ms * 1e6)
        load_start = queue_start - int(load_ms * 1e6)
        _tracer.start_span("load", context=contexts[parent], start_time=load_start).end(queue_start)
        _tracer.start_span("queue", context=contexts[parent], start_time=queue_start).end(start)
        if parent != first:
            _tracer.start_span("compute", context=contexts[parent], start_time=start, links=link).end(end)


def _context(traceparent: str) -> Any:
    """Return OpenTelemetry's context with the span of `traceparent`; an empty context if `traceparent` is invalid."""
    from opentelemetry.context import Context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    return TraceContextTextMapPropagator().extract({"traceparent": traceparent}, context=Context())


def _span_context(context: Any) -> "SpanContext":
    from opentelemetry.trace import get_current_span

    return get_current_span(context).get_span_context()
