"""Spans of one request across processes, and what happens without tracing."""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from adakv_serve.serving.http.asgi import Message
from adakv_serve.serving.http.compression_proof import ProofMiddleware
from adakv_serve.serving.http.tracing import annotate, carried, note_span, serving_span, span
from adakv_serve.serving.vllm_engine.tenants import TenantMiddleware

CLIENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Spans:
    """The spans that have ended, by name."""

    def __init__(self, exporter: InMemorySpanExporter) -> None:
        self._exporter = exporter

    def __getitem__(self, name: str) -> ReadableSpan:
        (found,) = [one for one in self._exporter.get_finished_spans() if one.name == name]
        return found

    def parent_of(self, name: str) -> int:
        parent = self[name].parent
        assert parent is not None
        return parent.span_id

    def id_of(self, name: str) -> int:
        context = self[name].context
        assert context is not None
        return context.span_id


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Iterator[Spans]:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    # A process takes one provider for good, and other tests need none.
    monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)
    yield Spans(exporter)
    provider.shutdown()


def test_a_trace_goes_on_in_the_next_process(spans: Spans) -> None:
    headers = [(b"a", b"b"), (b"traceparent", CLIENT.encode())]
    with serving_span("request", headers):
        with span("predict", tokens=7):
            pass
        handed_on, routed = list(headers), carried()
    assert headers == [(b"a", b"b"), (b"traceparent", CLIENT.encode())]
    note_span("route", routed, 0.5, {"reason": "affinity"})
    with serving_span("replica", handed_on):
        annotate("adakv", {"kept": 3, "session": {"turn": 2, "skipped": None}})
    assert spans.parent_of("request") == 0xB7AD6B7169203331
    for name in ("predict", "route", "replica"):
        assert spans.parent_of(name) == spans.id_of("request"), name
        context = spans[name].context
        assert context is not None
        assert context.trace_id == 0x0AF7651916CD43DD8448EB211C80319C
    assert spans["replica"].attributes == {"adakv.kept": 3, "adakv.session.turn": 2}
    route = spans["route"]
    assert route.start_time is not None
    assert route.end_time is not None
    assert route.end_time - route.start_time == 500_000_000


async def receive() -> Message:
    return {"type": "http.request", "body": b"", "more_body": False}


async def send(message: Message) -> None:
    pass


async def test_an_engine_finds_its_replicas_span(spans: Spans) -> None:
    async def engine(scope: Any, receive: Any, send: Any) -> None:
        with serving_span("llm_request", list(scope["headers"])):
            pass

    scope = {"type": "http", "method": "POST", "headers": [(b"traceparent", CLIENT.encode())]}
    await TenantMiddleware(ProofMiddleware(engine))(scope, receive, send)
    assert spans.parent_of("llm_request") == spans.id_of("replica")


def test_without_tracing_a_clients_own_trace_passes_unchanged() -> None:
    headers = [(b"traceparent", CLIENT.encode())]
    with serving_span("request", headers):
        assert headers == [(b"traceparent", CLIENT.encode())]
        annotate("adakv", {"kept": 3})
    headers.clear()
    with serving_span("request", headers):
        assert headers == []
        assert carried() == {}
    note_span("route", None, 0.5, {})


def test_a_client_that_leaves_is_no_error(spans: Spans) -> None:
    headers = [(b"traceparent", CLIENT.encode()), (b"tracestate", b"a=1"), (b"tracestate", b"b=2")]
    with contextlib.suppress(ConnectionError), serving_span("request", headers):
        assert (b"tracestate", b"a=1,b=2") in headers
        raise ConnectionError
    assert spans["request"].status.is_unset
    assert not spans["request"].events
