"""Traces by OpenTelemetry: one from a command through the API to the worker and back.

Behind the extra ``otel``, and only where ``OTEL_EXPORTER_OTLP_ENDPOINT`` (or ``…_TRACES_ENDPOINT``) says where to;
OpenTelemetry's other variables hold, too. Without both nothing of it is imported and everything here does nothing.
FastAPI makes the spans of requests, OpenTelemetry's instrumentation of httpx those of our client's calls, and we those
of SQL (OpenTelemetry's knows SQLAlchemy below 2.1) and of jobs: a job keeps the place in the trace of the request that
asked for it, and its worker goes on from there. Whatever leaves is redacted first (`cleaned`).
"""

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from .core.redaction import clean, redact

if TYPE_CHECKING:
    from fastapi.telemetry import TelemetryConfig
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.trace import Span, Tracer
    from sqlalchemy import Engine

_SHORT_S = 3.0
"""How long a collector that does not answer holds up the end of a process, unless the environment says more."""
_TOO_OFTEN = ("/health", "/metrics", "/v1/jobs/claim", "/store/")
_tracer: "Tracer | None" = None


def configure(env: Mapping[str, str], service: str) -> bool:
    """Send the traces of this process as ``loractl-<service>``, once; whether the environment and the extra say so."""
    global _tracer  # noqa: PLW0603  # a process has one provider, in OpenTelemetry too
    wanted = env.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") or env.get("OTEL_EXPORTER_OTLP_ENDPOINT")
    off = env.get("OTEL_SDK_DISABLED", "").lower() == "true" or env.get("OTEL_TRACES_EXPORTER") == "none"
    if _tracer is not None or not wanted or off or find_spec("opentelemetry.sdk") is None:
        return _tracer is not None
    from opentelemetry import trace
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.instrumentation.httpx import HTTPXClientInstrumentor
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    class Exporter(OTLPSpanExporter):
        def export(self, spans: Sequence["ReadableSpan"]) -> Any:
            return super().export([cleaned(span) for span in spans if not _alone(span)])

    told = any("OTLP" in name and name.endswith("TIMEOUT") for name in env)
    name = {} if "OTEL_SERVICE_NAME" in env else {"service.name": f"loractl-{service}"}
    provider = TracerProvider(resource=Resource.create(name))
    provider.add_span_processor(BatchSpanProcessor(Exporter(timeout=None if told else _SHORT_S)))
    trace.set_tracer_provider(provider)
    HTTPXClientInstrumentor().instrument()
    _tracer = trace.get_tracer("loractl")
    return True


def watch(engine: "Engine") -> None:
    """Make a span of each statement within a request; its text has placeholders and no values."""
    if _tracer is None:
        return
    from opentelemetry.trace import SpanKind, Status, StatusCode
    from sqlalchemy import event

    tracer, system = _tracer, engine.dialect.name

    def begins(_c: Any, _cursor: Any, statement: str, _values: Any, context: Any, _many: bool) -> None:
        said = {"db.system.name": system, "db.query.text": statement}
        context._loractl_span = tracer.start_span(statement.split(maxsplit=1)[0], kind=SpanKind.CLIENT, attributes=said)

    def ended(_c: Any, _cursor: Any, _statement: str, _values: Any, context: Any, _many: bool) -> None:
        context._loractl_span.end()

    def failed(error: Any) -> None:
        if (span := getattr(error.execution_context, "_loractl_span", None)) is not None:
            span.set_status(Status(StatusCode.ERROR, type(error.original_exception).__name__))
            span.end()

    event.listen(engine, "before_cursor_execute", begins)
    event.listen(engine, "after_cursor_execute", ended)
    event.listen(engine, "handle_error", failed)


def too_often(scope: MutableMapping[str, Any]) -> bool:
    """Whether a request is one of those that say nothing: signs of life, wake-ups, scrapes, bytes."""
    path = scope.get("path", "")
    return bool(path.startswith(_TOO_OFTEN) or path.endswith("/heartbeat"))


def current() -> str | None:
    """Our place in the trace, as the W3C's ``traceparent``; None where there is none."""
    if _tracer is None:
        return None
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier)
    return carrier.get("traceparent")


def of_requests() -> "TelemetryConfig":
    """What FastAPI makes of requests: a span each where this process sends any, and nothing else."""
    return {
        "exclude": too_often, "tracing": _tracer is not None, "operation_spans": False, "metrics": False, "logs": False,
        "auto_configure": False,
    }  # fmt: skip


def begin(name: str, traceparent: str | None = None, about: Mapping[str, object] | None = None) -> "Span | None":
    """A span behind ``traceparent``, or the first one of a trace; whoever begins it ends it."""
    if _tracer is None:
        return None
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    behind = TraceContextTextMapPropagator().extract({"traceparent": traceparent} if traceparent else {})
    said = {f"loractl.{key}": str(value) for key, value in (about or {}).items() if value is not None}
    return _tracer.start_span(name, context=behind, attributes=said)


@contextmanager
def within(span: "Span | None") -> Iterator[None]:
    """What is done in the block belongs to ``span``."""
    if span is None:
        yield
        return
    from opentelemetry.trace import use_span

    with use_span(span):
        yield


def end(span: "Span | None", outcome: str) -> None:
    """The span is over, with ``outcome`` in a word."""
    if span is not None:
        span.set_attribute("loractl.outcome", outcome)
        span.end()


def flush() -> None:
    """Send what waits, before a process ends in a way that leaves no time for it."""
    if _tracer is not None:
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.trace import get_tracer_provider

        provider = get_tracer_provider()
        assert isinstance(provider, TracerProvider)
        provider.force_flush(int(_SHORT_S * 1000))


def cleaned(span: "ReadableSpan") -> "ReadableSpan":
    """The span without secrets: in attributes, events and the words of its status."""
    from opentelemetry.sdk.trace import Event, ReadableSpan
    from opentelemetry.trace import Status

    status = span.status
    return ReadableSpan(
        name=str(redact(span.name)),
        context=span.context,
        parent=span.parent,
        resource=span.resource,
        attributes=_clean(span.attributes),
        events=[Event(event.name, _clean(event.attributes), event.timestamp) for event in span.events],
        links=span.links,
        kind=span.kind,
        instrumentation_scope=span.instrumentation_scope,
        status=Status(status.status_code, str(redact(status.description)) if status.description else None),
        start_time=span.start_time,
        end_time=span.end_time,
    )


def _clean(attributes: Mapping[str, Any] | None) -> dict[str, Any]:
    return {key: clean(key, value) for key, value in (attributes or {}).items()}


def _alone(span: "ReadableSpan") -> bool:
    """Whether it is a call that belongs to nothing, as a worker's signs of life are, and SQL beside a request."""
    from opentelemetry.trace import SpanKind

    return span.parent is None and span.kind is SpanKind.CLIENT
