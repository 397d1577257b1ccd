"""ASGI middleware that adds the proof of compression to responses, as `kv_compression`.

A whole answer gets the summary at the top and a proof in each choice. A stream gets a choice's
proof in the chunk that ends the choice, and the summary in the event that closes the answer: the
chunk with the usage, `response.completed`, `message_delta`.
"""

import json
from collections.abc import Iterable

from adakv_serve.serving.http.answer_proofs import AnswerProofs, answering
from adakv_serve.serving.http.asgi import (
    ASGIApp,
    Message,
    Receive,
    Scope,
    Send,
    body_of,
    header,
    is_last,
)
from adakv_serve.serving.http.sse import JsonObject, compact_json, data_of, split_events, with_data
from adakv_serve.serving.http.tracing import annotate
from adakv_worker.messages import PROOF_KEY

# Events of OpenAI's Responses API that carry the whole answer.
_WHOLE_RESPONSE = ("response.completed", "response.incomplete", "response.failed")
# Every event that takes a proof contains one of these. Generated text cannot imitate them, because
# its quotes are escaped. Parsing every event would cost more than all other work here.
_MARKS = (
    b'"finish_reason":"', b'"choices":[]', b'"type":"message_delta"',
    *(b'"type":"' + kind.encode() + b'"' for kind in _WHOLE_RESPONSE),
)  # fmt: skip


class ProofMiddleware:
    """An ASGI app around vLLM's, which adds proofs to the answers of POST requests."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        with answering() as proofs:
            await self._app(scope, receive, _Response(send, proofs).send)
            # Spans have no room for each head.
            annotate("adakv.compression", {**(proofs.summary() or {}), "detail": None})


class _Response:
    """Rewrites the messages of one response."""

    def __init__(self, send: Send, proofs: AnswerProofs) -> None:
        self._send = send
        self._proofs = proofs
        self._start: Message | None = None
        self._body = b""

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            if header(message, b"content-type").startswith(b"application/json"):
                # The content length is unknown until the proof is in.
                self._start = message
            else:
                await self._send(message)
        elif message["type"] != "http.response.body":
            await self._send(message)
        elif self._start is None:
            await self._send({**message, "body": self._add_to_stream(message)})
        else:
            await self._collect(message)

    async def _collect(self, message: Message) -> None:
        assert self._start is not None
        self._body += body_of(message)
        if not is_last(message):
            return
        body = self._body
        if self._start["status"] == 200 and (summary := self._proofs.summary()) is not None:
            body = _with_proofs(body, summary, self._proofs)
        headers = [
            (name, value) for name, value in self._start["headers"] if name != b"content-length"
        ]
        headers.append((b"content-length", str(len(body)).encode()))
        await self._send({**self._start, "headers": headers})
        await self._send({**message, "body": body})

    def _add_to_stream(self, message: Message) -> bytes:
        """Return the events that are complete, with proofs; keep the rest for later."""
        body = self._body + body_of(message)
        if is_last(message):
            events, self._body = [body], b""
        else:
            events, self._body = split_events(body)
        return b"".join(self._add_to_event(event) for event in events)

    def _add_to_event(self, event: bytes) -> bytes:
        summary = self._proofs.summary() if any(mark in event for mark in _MARKS) else None
        if summary is None or (data := data_of(event)) is None:
            return event
        kind = data.get("type")
        if kind in _WHOLE_RESPONSE:
            data["response"][PROOF_KEY] = summary
        elif kind == "message_delta" or (data.get("choices") == [] and data.get("usage")):
            data[PROOF_KEY] = summary
        else:
            ended = [choice for choice in data.get("choices", ()) if choice.get("finish_reason")]
            _add_to_choices(ended, self._proofs)
        return with_data(event, data)


def _with_proofs(body: bytes, summary: JsonObject, proofs: AnswerProofs) -> bytes:
    answer = json.loads(body)
    if not isinstance(answer, dict):
        return body
    _add_to_choices(answer.get("choices", ()), proofs)
    return compact_json({**answer, PROOF_KEY: summary})


def _add_to_choices(choices: Iterable[JsonObject], proofs: AnswerProofs) -> None:
    for choice in choices:
        if (proof := proofs.of_choice(choice["index"])) is not None:
            choice[PROOF_KEY] = proof
