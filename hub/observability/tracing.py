"""OpenTelemetry traces: a request, its decoding, its call to a worker, and there load, queue and the pass.

Off unless `start` was called, and then nothing of OpenTelemetry is imported. Where it goes and how much is sampled is
OpenTelemetry's own to read from `OTEL_*`; nothing here reads the environment. A pass computes images of many
requests: its span stands in the trace of one of them and links to the others; each of those links back.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span, SpanContext, Tracer

OTLP = {"http/protobuf": "otlp_proto_http", "grpc": "otlp_proto_grpc"}
NAME = "karst-hub"

_provider: "TracerProvider | None" = None
_tracer: "Tracer | None" = None
_NOTHING = nullcontext()


class TracingError(ValueError):
    """Traces are asked for, and what is needed for them is not installed."""


class _Known(Protocol):
    """Of a request: see `logs.Asked`."""

    request_id: str
    tenant: str
    task: str
    version: int | None
    error: str


def start(exporter: str, protocol: str = "http/protobuf") -> None:
    """Trace in this process from now on; again is no harm.

    Args:
        exporter: `none`, `otlp`, `console`, or another of OpenTelemetry's that is installed.
        protocol: of `otlp`: `http/protobuf` or `grpc`.

    Raises:
        TracingError: the exporter is not installed.
    """
    if exporter == "none" or _provider is not None:
        return
    name = OTLP.get(protocol, protocol) if exporter == "otlp" else exporter
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
    if str(resource.attributes[SERVICE_NAME]).startswith("unknown_service"):  # OTEL_SERVICE_NAME says nothing
        resource = resource.merge(Resource({SERVICE_NAME: NAME}))
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)  # sampler and limits by OTEL_*
    provider.add_span_processor(BatchSpanProcessor(kind()))
    use(provider)


def use(provider: "TracerProvider | None") -> None:
    """Trace with this provider, or not at all."""
    global _provider, _tracer
    _provider, _tracer = provider, provider.get_tracer(NAME) if provider is not None else None


def stop() -> None:
    """Send what was not sent yet, and trace no more."""
    if _provider is not None:
        _provider.shutdown()
    use(None)


def span(name: str, **attributes: str | int | float) -> AbstractContextManager[Any]:
    """What runs in the context is a part of the span that runs now. Gives the span, or None where nothing is traced."""
    if _tracer is None:
        return _NOTHING
    return _tracer.start_as_current_span(name, attributes={f"karst.{k}": v for k, v in attributes.items()})


def request(traceparent: bytes, method: str) -> AbstractContextManager["Span | None"]:
    """The span of a whole HTTP request, in its sender's trace where it names one (W3C `traceparent`)."""
    if _tracer is None:
        return _NOTHING
    from opentelemetry.trace import SpanKind

    return _tracer.start_as_current_span(
        "request",
        context=_context(traceparent.decode("latin-1")),
        kind=SpanKind.SERVER,
        attributes={"http.request.method": method},
    )


@contextmanager
def call(images: int) -> Iterator[None]:
    """The span of a call to a worker."""
    if _tracer is None:
        yield
        return
    from opentelemetry.trace import SpanKind

    with _tracer.start_as_current_span("worker", kind=SpanKind.CLIENT, attributes={"karst.images": images}):
        yield


def describe(span: "Span", route: str, status: int, asked: _Known) -> None:
    """What is known of a request at its end."""
    from opentelemetry.trace import Status, StatusCode

    if not span.is_recording():
        return
    known: dict[str, str | int] = {
        "http.route": route,
        "http.response.status_code": status,
        "error.type": asked.error,
        "karst.request_id": asked.request_id,
        "karst.tenant": asked.tenant,
        "karst.task": asked.task,
        "karst.version": asked.version or "",
    }
    span.set_attributes({name: value for name, value in known.items() if value != ""})
    if status >= 500:
        span.set_status(Status(StatusCode.ERROR))


def traceparent() -> str:
    """The span that runs now, for whoever works on it elsewhere; "" where it is not recorded."""
    if _tracer is None:
        return ""
    from opentelemetry.trace import get_current_span

    at = get_current_span().get_span_context()
    if not at.is_valid or not at.trace_flags.sampled:
        return ""
    return f"00-{at.trace_id:032x}-{at.span_id:016x}-01"


def passed(
    calls: Mapping[str, tuple[float, float]], *, worker: str, images: int, tasks: int, compute_ms: float
) -> None:
    """A forward pass has just ended: its span, and for each traced call those of its load, its queue and its compute.

    Args:
        calls: traceparent -> milliseconds of load and of waiting; those without one are left out by the caller.
    """
    if _tracer is None or not calls:
        return
    from opentelemetry.trace import Link

    end = time.time_ns()
    began = end - int(compute_ms * 1e6)
    contexts = {parent: _context(parent) for parent in calls}
    first, *others = calls
    the_pass = _tracer.start_span(
        "pass",
        context=contexts[first],
        start_time=began,
        links=[Link(_span_context(contexts[parent])) for parent in others],
        attributes={"karst.worker": worker, "karst.images": images, "karst.tasks": tasks},
    )
    the_pass.end(end)
    link = [Link(the_pass.get_span_context())]
    for parent, (load_ms, wait_ms) in calls.items():
        queued = began - int(wait_ms * 1e6)
        loaded = queued - int(load_ms * 1e6)
        _tracer.start_span("load", context=contexts[parent], start_time=loaded).end(queued)
        _tracer.start_span("queue", context=contexts[parent], start_time=queued).end(began)
        if parent != first:
            _tracer.start_span("compute", context=contexts[parent], start_time=began, links=link).end(end)


def _context(traceparent: str) -> Any:
    """OpenTelemetry's context with this as the span that runs; an empty one if it is none."""
    from opentelemetry.context import Context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    return TraceContextTextMapPropagator().extract({"traceparent": traceparent}, context=Context())


def _span_context(context: Any) -> "SpanContext":
    from opentelemetry.trace import get_current_span

    return get_current_span(context).get_span_context()
