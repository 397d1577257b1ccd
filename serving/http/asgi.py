"""ASGI over a handle call: one request in, batches of response messages out."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]

# Most response messages that wait for a slow reader; then the app waits too.
_QUEUED_MESSAGES = 256
# Internal message that wakes the reader when the app has ended.
_END = "adakv.end"
_PORTABLE_SCOPE_KEYS = (
    "type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string",
    "root_path", "headers", "client", "server",
)  # fmt: skip


def header(message: Message | Scope, name: bytes) -> bytes:
    """Return a header of a request or a response's start, empty if missing."""
    headers: dict[bytes, bytes] = dict(message.get("headers", ()))
    return headers.get(name, b"")


def is_event_stream(start: Message) -> bool:
    """Return whether a response's start announces server-sent events."""
    return header(start, b"content-type").startswith(b"text/event-stream")


def body_of(message: Message) -> bytes:
    """Return the part of a body that a message has, perhaps none."""
    part: bytes = message.get("body", b"")
    return part


def is_last(message: Message) -> bool:
    """Return whether a body ends with this message."""
    return not message.get("more_body", False)


def portable_scope(scope: Scope) -> Scope:
    """Return the part of an HTTP scope that another process can use."""
    return {key: scope[key] for key in _PORTABLE_SCOPE_KEYS if key in scope}


def route_path(scope: Scope) -> str:
    """Return the path below the prefix at which the application is mounted."""
    path: str = scope["path"]
    prefix: str = scope.get("root_path", "").rstrip("/")
    below = path.removeprefix(prefix)
    is_below = path.startswith(prefix) and below[:1] in ("", "/")
    return (below or "/") if is_below else path


async def run_lifespan(receive: Receive, send: Send) -> None:
    """Confirm the server's start and end, for an app that does nothing at either."""
    while True:
        message = await receive()
        if message["type"] == "lifespan.startup":
            await send({"type": "lifespan.startup.complete"})
        elif message["type"] == "lifespan.shutdown":
            await send({"type": "lifespan.shutdown.complete"})
            return


async def call_app(
    app: ASGIApp, scope: Scope, body: bytes, grace_s: float = 5.0
) -> AsyncGenerator[list[Message], None]:
    """Run one HTTP request against `app` and yield its response messages.

    Each batch holds the messages that arrived since the last yield, consecutive body chunks joined.
    Closing or cancelling the iterator is the client's disconnect: the app receives
    `http.disconnect`, and is cancelled if it has not ended within `grace_s`. An exception of the
    app is raised here, after the messages that it sent before.
    """
    queue: asyncio.Queue[Message] = asyncio.Queue(_QUEUED_MESSAGES)
    disconnected = asyncio.Event()
    requests: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        if requests:
            return requests.pop()
        await disconnected.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        if not disconnected.is_set():
            await queue.put(message)

    task = asyncio.ensure_future(app(dict(scope), receive, send))
    task.add_done_callback(lambda _: _wake(queue))
    try:
        while True:
            batch = await _waiting(queue)
            ended = batch[-1]["type"] == _END
            messages = _joined(message for message in batch if message["type"] != _END)
            if messages:
                yield messages
            if ended or (task.done() and queue.empty()):
                break
        await task
    finally:
        disconnected.set()
        if not task.done():
            _end_after_disconnect(task, queue, grace_s)


async def _waiting(queue: asyncio.Queue[Message]) -> list[Message]:
    batch = [await queue.get()]
    while not queue.empty():
        batch.append(queue.get_nowait())
    return batch


def _end_after_disconnect(
    task: asyncio.Future[None], queue: asyncio.Queue[Message], grace_s: float
) -> None:
    # On `http.disconnect` vLLM's non-streaming handlers abort their request; when cancelled they
    # leave it running. So the message comes first.
    while not queue.empty():
        queue.get_nowait()
    timer = asyncio.get_running_loop().call_later(grace_s, task.cancel)

    def settle(done: asyncio.Future[None]) -> None:
        timer.cancel()
        if not done.cancelled():
            done.exception()

    task.add_done_callback(settle)


def _wake(queue: asyncio.Queue[Message]) -> None:
    # A full queue needs no wake-up: its reader checks the task after draining it.
    if not queue.full():
        queue.put_nowait({"type": _END})


def _joined(messages: Iterable[Message]) -> list[Message]:
    joined: list[Message] = []
    for message in messages:
        last = joined[-1] if joined else None
        if last and last["type"] == message["type"] == "http.response.body":
            joined[-1] = {
                "type": "http.response.body",
                "body": body_of(last) + body_of(message),
                "more_body": not is_last(message),
            }
        else:
            joined.append(message)
    return joined
