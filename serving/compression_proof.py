"""Puts the proof of compression into OpenAI responses, as the top-level object `kv_compression`.

vLLM hands it through in `kv_transfer_params`, which has no place in a stream. So it is noted where
the engine's outputs pass by, and added where the response does. Knows ASGI, not vLLM.
"""

import json
from collections.abc import AsyncGenerator, Callable
from contextvars import ContextVar
from typing import Any

from serving.asgi import ASGIApp, Message, Receive, Scope, Send

KEY = "kv_compression"

Proof = dict[str, Any]
# A list of at most one, made for each HTTP request: its handler's tasks all see the same.
_noted: ContextVar[list[Proof] | None] = ContextVar("adakv_proof", default=None)


def noting(
    generate: Callable[..., AsyncGenerator[Any, None]],
) -> Callable[..., AsyncGenerator[Any, None]]:
    """Wraps `AsyncLLM.generate`: notes each request's proof, the first choice's where n > 1."""

    async def noted(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
        async for output in generate(*args, **kwargs):
            proof = (output.kv_transfer_params or {}).get(KEY)
            if proof is not None:
                _note(output, proof)
            yield output

    return noted


def _note(output: Any, proof: Proof) -> None:
    holder = _noted.get()
    if holder is None:
        return
    first_choice = any(choice.index == 0 for choice in output.outputs)
    if first_choice or not holder:
        holder[:] = [proof]


class ProofMiddleware:
    """An ASGI app around vLLM's."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        holder: list[Proof] = []
        token = _noted.set(holder)
        try:
            await self._app(scope, receive, _Response(send, holder).send)
        finally:
            _noted.reset(token)


class _Response:
    """Rewrites one response as it passes."""

    def __init__(self, send: Send, holder: list[Proof]) -> None:
        self._send = send
        self._holder = holder
        self._start: Message | None = None
        self._body = b""

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            if _content_type(message).startswith(b"application/json"):
                # Its length is known only when the proof is in.
                self._start = message
            else:
                await self._send(message)
        elif message["type"] != "http.response.body":
            await self._send(message)
        elif self._start is None:
            body = message.get("body", b"")
            await self._send({**message, "body": self._with_proof_in_usage(body)})
        else:
            await self._collect(message)

    async def _collect(self, message: Message) -> None:
        assert self._start is not None
        self._body += message.get("body", b"")
        if message.get("more_body", False):
            return
        body = self._body
        if self._holder and self._start["status"] == 200:
            body = _json(_with_proof(json.loads(body), self._holder[0]))
        headers = [
            (name, value) for name, value in self._start["headers"] if name != b"content-length"
        ]
        headers.append((b"content-length", str(len(body)).encode()))
        await self._send({**self._start, "headers": headers})
        await self._send({**message, "body": body})

    def _with_proof_in_usage(self, event: bytes) -> bytes:
        """The event with the proof, if it is the one that closes a stream with its usage."""
        if not self._holder or b'"usage":{' not in event or b'"choices":[]' not in event:
            return event
        lines = event.split(b"\n")
        for index, line in enumerate(lines):
            if line.startswith(b"data: {"):
                chunk = json.loads(line.removeprefix(b"data: "))
                lines[index] = b"data: " + _json(_with_proof(chunk, self._holder[0]))
        return b"\n".join(lines)


def _content_type(start: Message) -> bytes:
    return dict(start.get("headers", ())).get(b"content-type", b"")


def _with_proof(body: Any, proof: Proof) -> Any:
    if not isinstance(body, dict):
        return body
    if isinstance(params := body.get("kv_transfer_params"), dict):
        rest = {key: value for key, value in params.items() if key != KEY}
        body["kv_transfer_params"] = rest or None
    return {**body, KEY: proof}


def _json(body: Any) -> bytes:
    return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()
