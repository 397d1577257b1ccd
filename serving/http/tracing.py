"""OpenTelemetry spans of requests, one trace for each, from the door to the cache.

They go where the engine sends its own: `engine.otlp_traces_endpoint`. Without it nothing is sent,
and a client's own trace passes through. vLLM's span `llm_request` has the times of queue, prefill
and decoding.
"""

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import Span, SpanKind
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

Headers = list[tuple[bytes, bytes]]

# The W3C's headers, which vLLM reads as well.
_TRACE_HEADERS = (b"traceparent", b"tracestate")
_NAME = "adakv"
_PROPAGATOR = TraceContextTextMapPropagator()


def start_tracing(endpoint: str | None, process: str) -> None:
    """Send this process' spans to an endpoint, by the protocol that vLLM uses; None sends none.

    Raises:
        ImportError: the exporter for the protocol is not installed.
    """
    if endpoint is None:
        return
    provider = TracerProvider(resource=Resource.create({"service.name": process}))
    provider.add_span_processor(BatchSpanProcessor(_exporter(endpoint)))
    trace.set_tracer_provider(provider)


def _exporter(endpoint: str) -> SpanExporter:
    if os.environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "grpc") == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc import trace_exporter as grpc

        return grpc.OTLPSpanExporter(endpoint=endpoint, insecure=True)
    from opentelemetry.exporter.otlp.proto.http import trace_exporter as http

    return http.OTLPSpanExporter(endpoint=endpoint)


@contextmanager
def serving_span(name: str, headers: Headers) -> Iterator[Span]:
    """Make a new span the current one, below the one that a request's headers name.

    While it lasts, `headers` names it in place of that one. An exception, as of a client that
    leaves, is no error of the span.
    """
    tracer, before = trace.get_tracer(_NAME), list(headers)
    context = _PROPAGATOR.extract(_decoded(headers))
    with tracer.start_as_current_span(
        name, context=context, kind=SpanKind.SERVER, record_exception=False,
        set_status_on_exception=False,
    ) as span:  # fmt: skip
        if span.get_span_context().is_valid:
            headers[:] = [pair for pair in headers if pair[0] not in _TRACE_HEADERS]
            headers += [(key.encode(), value.encode()) for key, value in carried().items()]
        try:
            yield span
        finally:
            headers[:] = before


@contextmanager
def span(name: str, **attributes: Any) -> Iterator[Span]:
    """Make a new span below the current one the current one."""
    with trace.get_tracer(_NAME).start_as_current_span(name, attributes=attributes) as one:
        yield one


def carried() -> dict[str, str]:
    """Return what another process needs to go on with the current trace."""
    carrier: dict[str, str] = {}
    _PROPAGATOR.inject(carrier)
    return carrier


def note_span(
    name: str, carrier: Mapping[str, str] | None, seconds: float, attributes: Mapping[str, Any]
) -> None:
    """Add a span that ends now, below the one that `carrier` names; nothing without one."""
    if not carrier:
        return
    ended_ns = time.time_ns()
    began_ns = ended_ns - round(seconds * 1e9)
    one = trace.get_tracer(_NAME).start_span(
        name, context=_PROPAGATOR.extract(carrier), start_time=began_ns, attributes=attributes
    )
    one.end(ended_ns)


def annotate(prefix: str, values: Mapping[str, Any]) -> None:
    """Add values to the current span, nested ones by dotted names; None is left out."""
    one = trace.get_current_span()
    if not one.is_recording():
        return
    for name, value in values.items():
        if isinstance(value, Mapping):
            annotate(f"{prefix}.{name}", value)
        elif value is not None:
            one.set_attribute(f"{prefix}.{name}", value)


def _decoded(headers: Headers) -> dict[str, str]:
    found: dict[str, list[str]] = {}
    for name, value in headers:
        if name in _TRACE_HEADERS:
            found.setdefault(name.decode("latin-1"), []).append(value.decode("latin-1"))
    # A list may come in several headers.
    return {name: ",".join(values) for name, values in found.items()}
