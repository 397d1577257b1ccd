"""ASGI middleware that answers the fleet page, its files and its feed."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from adakv_serve.serving.http.api_keys import Caller
from adakv_serve.serving.http.asgi import ASGIApp, Message, Receive, Scope, Send, header, route_path
from adakv_serve.serving.http.door import Door
from adakv_serve.serving.http.loggable import loggable
from adakv_serve.serving.http.openai_error import error_messages
from adakv_serve.serving.http.page.feed import Feed, FeedFull
from adakv_serve.serving.http.page.files import page_files

_FEED = "/page/feed"
_SEEN = ("GET", "HEAD")
# A viewer comes back by itself. Until then its stream holds up the end of an ingress.
_LONGEST_S = 60.0
# Longest time for a viewer to take one state.
_SLOWEST_S = 20.0
_START: Message = {
    "type": "http.response.start",
    "status": 200,
    "headers": [
        (b"content-type", b"text/event-stream; charset=utf-8"),
        (b"cache-control", b"no-store"),
        (b"x-content-type-options", b"nosniff"),
    ],
}


class FleetPage:
    """An ASGI app around a front door. The page's files need no key; its feed needs one."""

    def __init__(
        self,
        app: ASGIApp,
        door: Door,
        feed: Feed,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            app: answers all other requests.
            door: has the keys, and is closed while it is drained.
        """
        self._app = app
        self._door = door
        self._feed = feed
        self._clock = clock
        self._files = page_files(needs_key=door.settings.has_keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = route_path(scope) if scope["type"] == "http" else ""
        if path == _FEED and scope["method"] == "GET":
            await self._answer_feed(scope, receive, send)
        elif path in self._files and scope["method"] in _SEEN:
            await _send_all(send, self._file(path, scope))
        else:
            await self._app(scope, receive, send)

    def _file(self, path: str, scope: Scope) -> list[Message]:
        if path == "/" and not scope["path"].endswith("/"):
            # The page's links are relative to the application's prefix.
            headers = [(b"location", f"{scope['path']}/".encode()), (b"content-length", b"0")]
            return [
                {"type": "http.response.start", "status": 307, "headers": headers},
                {"type": "http.response.body", "body": b"", "more_body": False},
            ]
        known = header(scope, b"if-none-match").decode("latin-1")
        return self._files[path].messages(with_body=scope["method"] == "GET", known=known)

    async def _answer_feed(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]
        }
        caller = self._door.keys.caller(_FEED, headers)
        if caller is None:
            challenge = {"www-authenticate": "Bearer"}
            await _fail(send, 401, "missing or wrong API key", "AuthenticationError", challenge)
        elif self._door.draining.active:
            await self._refuse(send, "the server is about to stop")
        else:
            try:
                with self._feed.viewing() as events:
                    self._log(caller, "begins")
                    try:
                        await self._stream(events, receive, send)
                    finally:
                        self._log(caller, "ends")
            except FeedFull:
                await self._refuse(send, "too many viewers: see ingress.page.max_viewers")

    async def _refuse(self, send: Send, problem: str) -> None:
        later = {"retry-after": "5"}
        await _fail(send, 503, problem, "ServiceUnavailable", later)

    def _log(self, caller: Caller, what: str) -> None:
        viewers = self._feed.viewers
        self._door.logger.info(
            "fleet page: a view %s key=%s viewers=%d", what, loggable(caller.name), viewers
        )

    async def _stream(
        self, events: AsyncGenerator[bytes, None], receive: Receive, send: Send
    ) -> None:
        gone = asyncio.ensure_future(_disconnect(receive))
        sending = asyncio.ensure_future(self._send_events(events, send))
        try:
            await asyncio.wait((gone, sending), return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            gone.cancel()
            sending.cancel()
            await asyncio.wait((gone, sending))

    async def _send_events(self, events: AsyncGenerator[bytes, None], send: Send) -> None:
        until_s = self._clock() + _LONGEST_S
        await send(_START)
        async with aclosing(events):
            async for event in events:
                await _send_in_time(send, event)
                if self._door.draining.active or self._clock() >= until_s:
                    break
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _send_in_time(send: Send, event: bytes) -> None:
    """Send an event.

    Raises:
        ConnectionAbortedError: the viewer does not read.
    """
    try:
        async with asyncio.timeout(_SLOWEST_S):
            await send({"type": "http.response.body", "body": event, "more_body": True})
    except TimeoutError:
        raise ConnectionAbortedError("a viewer of the fleet page does not read") from None


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _send_all(send: Send, messages: list[Message]) -> None:
    for message in messages:
        await send(message)


async def _fail(send: Send, status: int, problem: str, type_: str, headers: dict[str, str]) -> None:
    await _send_all(send, error_messages(status, problem, type_=type_, headers=headers))
