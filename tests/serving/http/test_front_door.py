"""The front door against a scripted backend: every way in which a replica can fail."""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import httpx
import pytest

from serving.http.asgi import Message
from serving.http.failures import NoReplica, Overloaded, ReplicaLost
from serving.http.front_door import FrontDoor, FrontDoorSettings

SSE_START: Message = {
    "type": "http.response.start",
    "status": 200,
    "headers": [(b"content-type", b"text/event-stream; charset=utf-8")],
}
JSON_START: Message = {**SSE_START, "headers": [(b"content-type", b"application/json")]}


def chunk(data: bytes, more: bool = True) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": more}


class ScriptedBackend:
    """Plays one script per attempt: batches to yield and exceptions to raise."""

    def __init__(self, *scripts: list[Any], ping: Exception | None = None) -> None:
        self.scripts = list(scripts)
        self.ping_error = ping
        self.calls: list[tuple[dict, bytes]] = []
        self.closed = asyncio.Event()

    async def stream(self, scope: dict, body: bytes) -> AsyncGenerator[list[Message], None]:
        self.calls.append((scope, body))
        try:
            for step in self.scripts[len(self.calls) - 1]:
                if isinstance(step, Exception):
                    raise step
                if isinstance(step, asyncio.Event):
                    await step.wait()
                else:
                    yield step
        finally:
            self.closed.set()

    async def ping(self) -> None:
        if self.ping_error:
            raise self.ping_error


def client(backend: ScriptedBackend, **settings: Any) -> httpx.AsyncClient:
    door = FrontDoor(backend, FrontDoorSettings(**settings), logging.getLogger("test"))
    transport = httpx.ASGITransport(app=door)
    return httpx.AsyncClient(transport=transport, base_url="http://door")


def error_of(response: httpx.Response) -> dict[str, Any]:
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == response.status_code
    return error


async def test_a_response_passes_through_with_its_request_id() -> None:
    backend = ScriptedBackend([[JSON_START, chunk(b"{}", more=False)]])
    response = await client(backend).post("/v1/completions", content=b"in")
    assert (response.status_code, response.content) == (200, b"{}")
    scope, body = backend.calls[0]
    assert body == b"in"
    assert dict(scope["headers"])[b"x-request-id"].decode() == response.headers["x-request-id"]


@pytest.mark.parametrize("given", ["", "has space", "x" * 200, 'quote"'])
async def test_an_unusable_request_id_never_reaches_the_engine(given: str) -> None:
    backend = ScriptedBackend([[JSON_START, chunk(b"{}", more=False)]])
    await client(backend).post("/v1/completions", headers={"x-request-id": given})
    seen = dict(backend.calls[0][0]["headers"])[b"x-request-id"].decode()
    assert seen != given
    assert seen


@pytest.mark.parametrize("authorization", [None, "Bearer wrong", "Basic right", "Bearer"])
async def test_a_missing_or_wrong_key_is_401(authorization: str | None) -> None:
    headers = {"authorization": authorization} if authorization else {}
    backend = ScriptedBackend()
    response = await client(backend, api_keys=("right",)).get("/v1/models", headers=headers)
    assert response.status_code == 401
    assert error_of(response)["type"] == "AuthenticationError"
    assert backend.calls == []


async def test_any_of_the_keys_opens_and_is_not_handed_on() -> None:
    backend = ScriptedBackend([[JSON_START, chunk(b"{}", more=False)]])
    headers = {"authorization": "Bearer two"}
    response = await client(backend, api_keys=("one", "two")).get("/v1/models", headers=headers)
    assert response.status_code == 200
    assert b"authorization" not in dict(backend.calls[0][0]["headers"])


async def test_health_needs_no_key_and_tells_whether_a_replica_answers() -> None:
    assert (await client(ScriptedBackend(), api_keys=("k",)).get("/health")).status_code == 200
    sick = ScriptedBackend(ping=NoReplica())
    assert (await client(sick).get("/health")).status_code == 503


async def test_a_compressed_body_is_415_and_says_why() -> None:
    backend = ScriptedBackend()
    headers = {"content-encoding": "gzip"}
    response = await client(backend).post("/v1/completions", content=b"\x1f\x8b", headers=headers)
    assert response.status_code == 415
    assert "'gzip'" in error_of(response)["message"]
    assert backend.calls == []


@pytest.mark.parametrize("path", ["/metrics", "/metrics/"])
async def test_metrics_are_not_those_of_an_arbitrary_replica(path: str) -> None:
    backend = ScriptedBackend()
    response = await client(backend).get(path)
    assert response.status_code == 404
    assert "--metrics-export-port" in error_of(response)["message"]
    assert backend.calls == []


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_over_the_limit_is_413_and_not_forwarded(chunked: bool) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(4):
            yield b"x" * 4

    backend = ScriptedBackend()
    content = pieces() if chunked else b"x" * 16
    response = await client(backend, max_body_bytes=15).post("/v1/completions", content=content)
    assert response.status_code == 413
    error_of(response)
    assert backend.calls == []


async def test_a_full_queue_is_503_with_retry_after() -> None:
    response = await client(ScriptedBackend([Overloaded(2.5)])).post("/v1/completions")
    assert response.status_code == 503
    assert response.headers["retry-after"] == "3"
    error_of(response)


async def test_no_replica_is_503() -> None:
    response = await client(ScriptedBackend([NoReplica()])).post("/v1/completions")
    assert response.status_code == 503
    assert "retry-after" in response.headers
    error_of(response)


async def test_a_replica_lost_before_the_first_byte_is_retried_once() -> None:
    backend = ScriptedBackend([ReplicaLost()], [[JSON_START, chunk(b"{}", more=False)]])
    assert (await client(backend).post("/v1/completions", content=b"same")).status_code == 200
    assert [body for _, body in backend.calls] == [b"same", b"same"]


async def test_a_second_loss_is_503() -> None:
    backend = ScriptedBackend([ReplicaLost()], [ReplicaLost()])
    response = await client(backend).post("/v1/completions")
    assert response.status_code == 503
    assert error_of(response)["type"] == "ReplicaLost"


async def test_an_unforeseen_failure_is_500_and_tells_nothing_about_our_insides() -> None:
    response = await client(ScriptedBackend([KeyError("secret")])).post("/v1/completions")
    assert response.status_code == 500
    assert "secret" not in error_of(response)["message"]


async def test_a_replica_lost_in_mid_stream_ends_the_stream_with_an_error_event() -> None:
    backend = ScriptedBackend([[SSE_START, chunk(b"data: 1\n\n")], ReplicaLost()])
    response = await client(backend).post("/v1/completions")
    first, last = response.text.strip().split("\n\n")
    assert first == "data: 1"
    assert json.loads(last.removeprefix("data: "))["error"]["type"] == "ReplicaLost"
    assert len(backend.calls) == 1


async def test_half_a_json_body_is_never_passed_off_as_whole() -> None:
    backend = ScriptedBackend([[JSON_START, chunk(b'{"a":')], ReplicaLost()])
    with pytest.raises(ConnectionAbortedError):
        await client(backend).post("/v1/completions")


async def test_a_client_that_goes_away_closes_the_backend_stream() -> None:
    backend = ScriptedBackend([[SSE_START], asyncio.Event()])
    door = FrontDoor(backend, FrontDoorSettings(), logging.getLogger("test"))
    started = asyncio.Event()
    incoming: asyncio.Queue[Message] = asyncio.Queue()

    async def send(message: Message) -> None:
        started.set()

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
    exchange = asyncio.create_task(door(scope, incoming.get, send))
    incoming.put_nowait({"type": "http.request", "body": b"", "more_body": False})
    await started.wait()
    incoming.put_nowait({"type": "http.disconnect"})
    await exchange
    assert backend.closed.is_set()
