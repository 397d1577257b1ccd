"""A backend that plays scripts, and clients of the front door before it."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from typing import Any

import httpx
import pytest

from adakv_serve.serving.http.asgi import Message, Scope
from adakv_serve.serving.http.door_settings import FrontDoorSettings
from adakv_serve.serving.http.front_door import FrontDoor

SSE_START: Message = {
    "type": "http.response.start",
    "status": 200,
    "headers": [(b"content-type", b"text/event-stream; charset=utf-8")],
}
JSON_START: Message = {**SSE_START, "headers": [(b"content-type", b"application/json")]}


def chunk(data: bytes, more: bool = True) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": more}


WHOLE: list[Message] = [JSON_START, chunk(b"{}", more=False)]


class ScriptedBackend:
    """Plays one script per attempt: batches to yield, exceptions to raise, events to await."""

    def __init__(self, *scripts: list[Any], ping: Exception | asyncio.Event | None = None) -> None:
        self.scripts = list(scripts)
        self.ping_result = ping
        self.calls: list[tuple[Scope, bytes]] = []
        self.closed = asyncio.Event()
        # Whether each script was played to its end.
        self.ended: list[str] = []
        self.pinged = asyncio.Semaphore(0)
        # What each request pays.
        self.tokens = 0

    async def stream(
        self, scope: Scope, body: bytes, pay: Callable[[int], None]
    ) -> AsyncGenerator[list[Message], None]:
        self.calls.append((scope, body))
        pay(self.tokens)
        try:
            for step in self.scripts[len(self.calls) - 1]:
                if isinstance(step, Exception):
                    raise step
                if isinstance(step, asyncio.Event):
                    await step.wait()
                else:
                    yield step
            self.ended.append("whole")
        except BaseException:
            self.ended.append("broken off")
            raise
        finally:
            self.closed.set()

    async def ping(self) -> None:
        self.pinged.release()
        if isinstance(self.ping_result, asyncio.Event):
            await self.ping_result.wait()
        elif self.ping_result is not None:
            raise self.ping_result


class Clock:
    """Time that a test sets."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def client(
    backend: ScriptedBackend, clock: Clock | None = None, **settings: Any
) -> httpx.AsyncClient:
    return door_and_client(backend, clock, **settings)[1]


def door_and_client(
    backend: ScriptedBackend, clock: Clock | None = None, **settings: Any
) -> tuple[FrontDoor, httpx.AsyncClient]:
    door = FrontDoor(
        backend, FrontDoorSettings(**settings), logging.getLogger("test"), clock or Clock()
    )
    transport = httpx.ASGITransport(app=door)
    return door, httpx.AsyncClient(transport=transport, base_url="http://door")


def error_of(response: httpx.Response) -> dict[str, Any]:
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == response.status_code
    return error


def messages_of_the_door(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return what a door has logged. Other libraries log too, if an import has made them."""
    return [record.getMessage() for record in caplog.records if record.name == "test"]


class Connection:
    """One request whose client the test controls."""

    def __init__(self, backend: ScriptedBackend) -> None:
        self._door = FrontDoor(backend, FrontDoorSettings(), logging.getLogger("test"))
        self.incoming: asyncio.Queue[Message] = asyncio.Queue()
        self.sent: list[Message] = []
        self.started = asyncio.Event()

    def start(self, **message: Any) -> asyncio.Task[None]:
        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
        self.incoming.put_nowait({"type": "http.request", "body": b"", **message})
        return asyncio.create_task(self._door(scope, self.incoming.get, self._send))

    def leave(self) -> None:
        self.incoming.put_nowait({"type": "http.disconnect"})

    async def _send(self, message: Message) -> None:
        self.sent.append(message)
        self.started.set()
