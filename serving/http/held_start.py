"""ASGI middleware that holds the start of a stream until its first event.

vLLM starts a streamed answer before the engine checks the request, so that a refusal would be an
error inside a 200. Holding the start gives it the status that it has without streaming, and lets
the front door retry a request whose replica dies before the first token.
"""

from http import HTTPStatus

from adakv_serve.serving.http.asgi import (
    ASGIApp,
    Message,
    Receive,
    Scope,
    Send,
    body_of,
    is_event_stream,
    is_last,
)
from adakv_serve.serving.http.sse import JsonObject, compact_json, data_of, split_events

# Events of OpenAI's Responses API that vLLM sends before it calls the engine.
_BEFORE_THE_ENGINE = ("response.created", "response.in_progress")
_STATUS_BY_NAME = {status.phrase.replace(" ", ""): status.value for status in HTTPStatus}


class HeldStart:
    """An ASGI app around another. Place it inside the layer that turns exceptions to responses."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        response = _Response(send)
        try:
            await self._app(scope, receive, response.send)
        except RuntimeError as error:
            # Starlette reports that the response has started, too late for the cause's handler.
            # But the start is still held here: the handler can answer.
            if response.held and isinstance(error.__cause__, Exception):
                raise error.__cause__ from None
            raise


class _Response:
    """Passes on the messages of one response."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._start: Message | None = None
        self._body = b""
        self._refused = False

    @property
    def held(self) -> bool:
        return self._start is not None

    async def send(self, message: Message) -> None:
        if self._refused:
            return
        if message["type"] == "http.response.start" and is_event_stream(message):
            self._start = message
        elif self._start is None:
            await self._send(message)
        else:
            await self._hold(self._start, message)

    async def _hold(self, start: Message, message: Message) -> None:
        self._body += body_of(message)
        event = _first_engine_event(self._body)
        if event is None and not is_last(message):
            return
        self._start = None
        if (error := _error_in(event)) is not None:
            self._refused = True
            await self._refuse(start, error)
        else:
            await self._send(start)
            await self._send({**message, "body": self._body})

    async def _refuse(self, start: Message, error: JsonObject) -> None:
        body = compact_json(error)
        headers = [
            *((name, value) for name, value in start["headers"] if name != b"content-type"),
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
        ]
        await self._send({**start, "status": _status(error["error"]), "headers": headers})
        await self._send({"type": "http.response.body", "body": body, "more_body": False})


def _first_engine_event(stream: bytes) -> bytes | None:
    events, _ = split_events(stream)
    for event in events:
        if (data_of(event) or {}).get("type") not in _BEFORE_THE_ENGINE:
            return event
    return None


def _error_in(event: bytes | None) -> JsonObject | None:
    data = data_of(event) if event is not None else None
    return data if data is not None and isinstance(data.get("error"), dict) else None


def _status(error: JsonObject) -> int:
    """Return the error's own status code, or the one that its type is named after."""
    code = error.get("code")
    if isinstance(code, int) and 400 <= code < 600:
        return code
    return _STATUS_BY_NAME.get(str(error.get("type")).removesuffix("Error"), 500)
