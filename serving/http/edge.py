"""ASGI middleware before Serve's own: one request id, and Serve's errors in OpenAI's form.

`configs/ray.env` has Serve call `middlewares`. Serve answers with the id that it finds in a
request, whatever that is, so it must find the one that all others use too. And Serve reads a body
before the front door asks for it, so a client that waits to be asked is refused here.
"""

import os
import re
import uuid
from collections.abc import Iterable, Iterator

from starlette.middleware import Middleware

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
from adakv_serve.serving.http.bodies import BodyRefused, refuse_length
from adakv_serve.serving.http.openai_error import error_messages

REQUEST_ID_HEADER = b"x-request-id"
# The variable that has `ingress.max_body_bytes` in the processes of an ingress.
MOST_BODY_BYTES_VARIABLE = "ADAKV_MAX_BODY_BYTES"
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
_TYPES = {404: "NotFoundError", 408: "RequestTimeout", 503: "ServiceUnavailable"}
_REPLACED_HEADERS = (b"content-type", b"content-length")
# Serve obeys these: a client could end its call early, or keep it running after it has left.
_OF_SERVE = (
    b"x-request-timeout-seconds", b"x-request-disconnect-disabled", b"serve-multiplexed-model-id",
)  # fmt: skip
_SESSION_ID = b"x-session-id"
# Pages of any site may read these errors, which tell nothing: the middleware that knows which sites
# may is inside the app.
_READABLE = {"access-control-allow-origin": "*"}
_LONGEST_ERROR_BYTES = 10_000


def middlewares() -> list[Middleware]:
    """Return what Serve's HTTP servers put around the app."""
    most_bytes = os.environ.get(MOST_BODY_BYTES_VARIABLE)
    return [Middleware(Edge, most_body_bytes=None if most_bytes is None else int(most_bytes))]


def is_request_id(given: bytes) -> bool:
    """Return whether a client's request id can stand in headers, bodies and logs."""
    return _REQUEST_ID.fullmatch(given) is not None


class Edge:
    """An ASGI app around the one of Serve."""

    def __init__(self, app: ASGIApp, most_body_bytes: int | None = None) -> None:
        """
        Args:
            most_body_bytes: size of the largest body; None leaves it to the app.
        """
        self._app = app
        self._most_body_bytes = most_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope = _with_one_id({**scope, "headers": list(_for_serve(scope["headers"]))})
        try:
            self._refuse_before_continue(scope)
        except BodyRefused as refused:
            await _send_refusal(refused, scope, send)
            return
        await self._app(scope, receive, _Errors(send))

    def _refuse_before_continue(self, scope: Scope) -> None:
        """Raise BodyRefused for a body too large whose sender waits for `100 Continue`."""
        if self._most_body_bytes is None or not header(scope, b"expect"):
            return
        refuse_length(header(scope, b"content-length").decode("latin-1"), self._most_body_bytes)


async def _send_refusal(refused: BodyRefused, scope: Scope, send: Send) -> None:
    # The body may follow all the same, and must not be read as the next request.
    headers = {
        "connection": "close",
        **_READABLE,
        REQUEST_ID_HEADER.decode(): header(scope, REQUEST_ID_HEADER).decode("latin-1"),
    }
    for message in error_messages(
        refused.status, str(refused), type_=refused.error_type, headers=headers
    ):
        await send(message)


def _for_serve(headers: Iterable[tuple[bytes, bytes]]) -> Iterator[tuple[bytes, bytes]]:
    """Yield a request's headers without Serve's own, and with a session's name in UTF-8.

    Serve reads that as UTF-8, and browsers send Latin-1.
    """
    for name, value in headers:
        plain = name.lower().replace(b"_", b"-")
        if plain == _SESSION_ID and not _is_utf8(value):
            value = value.decode("latin-1").encode()
        if plain not in _OF_SERVE:
            yield name, value


def _is_utf8(value: bytes) -> bool:
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True


def _with_one_id(scope: Scope) -> Scope:
    """Return a request with exactly one id: the first usable one of the client, else a new one."""
    given = [value for name, value in scope["headers"] if name == REQUEST_ID_HEADER]
    usable = next(filter(is_request_id, given), uuid.uuid4().hex.encode())
    others = [pair for pair in scope["headers"] if pair[0] != REQUEST_ID_HEADER]
    return {**scope, "headers": [*others, (REQUEST_ID_HEADER, usable)]}


class _Errors:
    """Sends a response; one that is an error in plain text, as Serve's are, in OpenAI's form."""

    def __init__(self, send: Send) -> None:
        self._send = send
        # The start of an error whose text is still to come.
        self._start: Message | None = None
        self._text = b""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start" and _is_plain_error(message):
            self._start = message
        elif self._start is None:
            await self._send(message)
        else:
            self._text = (self._text + body_of(message))[:_LONGEST_ERROR_BYTES]
            if is_last(message):
                await self._send_error(self._start)

    async def _send_error(self, start: Message) -> None:
        status = start["status"]
        type_ = _TYPES.get(status, "BadRequestError" if status < 500 else "InternalServerError")
        text = self._text.decode("utf-8", "replace")
        readable = {} if header(start, b"access-control-allow-origin") else _READABLE
        begin, body = error_messages(status, text, type_=type_, headers=readable)
        others = [pair for pair in start.get("headers", ()) if pair[0] not in _REPLACED_HEADERS]
        begin["headers"] = [*begin["headers"], *others]
        await self._send(begin)
        await self._send(body)


def _is_plain_error(start: Message) -> bool:
    is_text = header(start, b"content-type").startswith(b"text/plain")
    return start["status"] >= 400 and is_text
