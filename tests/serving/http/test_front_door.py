"""The front door before a scripted backend, which fails in every way a replica can."""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import httpx
import pytest

from serving.http.asgi import Message, Scope
from serving.http.failures import NoReplica, Overloaded, ReplicaLost
from serving.http.front_door import FrontDoor, FrontDoorSettings

QUEUE_FULL = "too many requests are waiting for a replica"
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

    async def stream(self, scope: Scope, body: bytes) -> AsyncGenerator[list[Message], None]:
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
    door = FrontDoor(
        backend, FrontDoorSettings(**settings), logging.getLogger("test"), clock or Clock()
    )
    transport = httpx.ASGITransport(app=door)
    return httpx.AsyncClient(transport=transport, base_url="http://door")


def error_of(response: httpx.Response) -> dict[str, Any]:
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == response.status_code
    return error


async def test_a_response_passes_through_with_its_request_id() -> None:
    backend = ScriptedBackend([WHOLE])
    response = await client(backend).post("/v1/completions", content=b"in")
    assert (response.status_code, response.content) == (200, b"{}")
    scope, body = backend.calls[0]
    assert body == b"in"
    assert dict(scope["headers"])[b"x-request-id"].decode() == response.headers["x-request-id"]


@pytest.mark.parametrize("given", ["", "has space", "x" * 200, 'quote"'])
async def test_an_unusable_request_id_never_reaches_the_engine(given: str) -> None:
    backend = ScriptedBackend([WHOLE])
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
    error = error_of(response)
    assert (error["type"], error["message"]) == ("AuthenticationError", "missing or wrong API key")
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.headers["content-type"] == "application/json"
    assert int(response.headers["content-length"]) == len(response.content)
    assert backend.calls == []


async def test_any_of_the_keys_opens_and_is_not_handed_on() -> None:
    backend = ScriptedBackend([WHOLE])
    headers = {"authorization": "Bearer two"}
    response = await client(backend, api_keys=("one", "two")).get("/v1/models", headers=headers)
    assert response.status_code == 200
    assert b"authorization" not in dict(backend.calls[0][0]["headers"])


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_health_is_200_without_a_key_if_a_replica_answers(method: str) -> None:
    response = await client(ScriptedBackend(), api_keys=("k",)).request(method, "/health")
    assert (response.status_code, response.content) == (200, b"")
    assert response.headers["content-length"] == "0"


@pytest.mark.parametrize("failure", [NoReplica(), ReplicaLost(), Overloaded(None)])
async def test_health_is_503_if_no_replica_answers(failure: Exception) -> None:
    response = await client(ScriptedBackend(ping=failure)).get("/health")
    assert response.status_code == 503
    error = error_of(response)
    assert (error["type"], error["message"]) == ("ServiceUnavailable", "no replica can answer")


async def test_health_is_503_if_a_replica_takes_too_long() -> None:
    silent = ScriptedBackend(ping=asyncio.Event())
    async with asyncio.timeout(60):
        response = await client(silent, health_timeout_s=0.01).get("/health")
    assert response.status_code == 503


async def test_an_answer_proves_health_for_five_seconds() -> None:
    clock = Clock()
    backend = ScriptedBackend([WHOLE], ping=ReplicaLost())
    door = client(backend, clock)
    assert (await door.get("/health")).status_code == 503
    await door.post("/v1/completions")
    clock.now += 4.9
    assert (await door.get("/health")).status_code == 200
    clock.now += 0.2
    assert (await door.get("/health")).status_code == 503


@pytest.mark.parametrize("method", ["POST", "DELETE"])
async def test_other_methods_on_health_go_to_a_replica(method: str) -> None:
    backend = ScriptedBackend([WHOLE])
    await client(backend).request(method, "/health")
    assert backend.calls[0][0]["method"] == method


async def test_a_replica_gets_the_whole_request() -> None:
    backend = ScriptedBackend([WHOLE])
    headers = {"x-custom": "kept", "content-encoding": "identity"}
    await client(backend).put("/v1/a%2Fb?limit=3&after=x", content=b"in", headers=headers)
    scope, body = backend.calls[0]
    assert (scope["method"], scope["path"], body) == ("PUT", "/v1/a/b", b"in")
    assert scope["query_string"] == b"limit=3&after=x"
    assert scope["raw_path"] == b"/v1/a%2Fb"
    assert dict(scope["headers"])[b"x-custom"] == b"kept"


async def test_the_servers_start_and_end_are_confirmed() -> None:
    incoming: asyncio.Queue[Message] = asyncio.Queue()
    sent: asyncio.Queue[Message] = asyncio.Queue()
    door = FrontDoor(ScriptedBackend(), FrontDoorSettings(), logging.getLogger("test"))
    incoming.put_nowait({"type": "lifespan.startup"})
    incoming.put_nowait({"type": "lifespan.shutdown"})
    await door({"type": "lifespan"}, incoming.get, sent.put)
    assert (await sent.get())["type"] == "lifespan.startup.complete"
    assert (await sent.get())["type"] == "lifespan.shutdown.complete"


async def test_a_websocket_is_closed_as_unsupported() -> None:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    door = FrontDoor(ScriptedBackend(), FrontDoorSettings(), logging.getLogger("test"))
    await door({"type": "websocket"}, asyncio.Queue[Message]().get, send)
    assert sent == [{"type": "websocket.close", "code": 1003}]


async def test_a_given_request_id_is_used_and_left_to_serve_to_echo() -> None:
    backend = ScriptedBackend([WHOLE])
    given = "A.b_c:d-" + "9" * 120
    response = await client(backend).post("/v1/completions", headers={"x-request-id": given})
    sent = [value for name, value in backend.calls[0][0]["headers"] if name == b"x-request-id"]
    assert sent == [given.encode()]
    assert "x-request-id" not in response.headers


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


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_of_exactly_the_limit_passes(chunked: bool) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(4):
            yield b"x" * 4

    backend = ScriptedBackend([WHOLE])
    content = pieces() if chunked else b"x" * 16
    response = await client(backend, max_body_bytes=16).post("/v1/completions", content=content)
    assert (response.status_code, backend.calls[0][1]) == (200, b"x" * 16)


@pytest.mark.parametrize(
    ("failure", "retry_after", "message"),
    [
        (Overloaded(2.5), "3", QUEUE_FULL), (Overloaded(0.0), "0", QUEUE_FULL),
        (Overloaded(-1.0), "0", QUEUE_FULL), (Overloaded(None), "7", QUEUE_FULL),
        (NoReplica("none"), "7", "no replica is available"),
    ],
)  # fmt: skip
async def test_a_full_queue_and_no_replica_are_503_at_once(
    failure: Exception, retry_after: str, message: str
) -> None:
    backend = ScriptedBackend([failure])
    response = await client(backend, retry_after_s=6.5).post("/v1/completions")
    assert response.status_code == 503
    assert response.headers["retry-after"] == retry_after
    error = error_of(response)
    assert (error["type"], error["message"]) == ("ServiceUnavailable", message)
    assert len(backend.calls) == 1


async def test_a_replica_lost_before_the_first_byte_is_retried_once() -> None:
    backend = ScriptedBackend([ReplicaLost()], [WHOLE])
    assert (await client(backend).post("/v1/completions", content=b"same")).status_code == 200
    assert [body for _, body in backend.calls] == [b"same", b"same"]


async def test_a_second_loss_is_503() -> None:
    backend = ScriptedBackend([ReplicaLost()], [ReplicaLost()])
    response = await client(backend).post("/v1/completions")
    assert response.status_code == 503
    error = error_of(response)
    assert error["type"] == "ReplicaLost"
    assert error["message"] == "the replica that worked on this request died"
    assert response.headers["retry-after"] == "1"
    assert len(backend.calls) == 2


async def test_an_unforeseen_failure_is_500_without_its_text(
    caplog: pytest.LogCaptureFixture,
) -> None:
    backend = ScriptedBackend([KeyError("secret")])
    response = await client(backend).post("/v1/completions")
    assert response.status_code == 500
    assert error_of(response)["message"] == "internal error"
    assert "secret" in caplog.text
    assert "retry-after" not in response.headers
    assert len(backend.calls) == 1


@pytest.mark.parametrize(
    ("failure", "type_", "code"),
    [
        (ReplicaLost(), "ReplicaLost", 503), (Overloaded(1.0), "ServiceUnavailable", 503),
        (KeyError("secret"), "InternalServerError", 500),
    ],
)  # fmt: skip
async def test_a_failure_in_mid_stream_ends_the_stream_with_an_error_event(
    failure: Exception, type_: str, code: int
) -> None:
    backend = ScriptedBackend([[SSE_START, chunk(b"data: 1\n\n")], failure])
    response = await client(backend).post("/v1/completions")
    first, last = response.text.strip().split("\n\n")
    assert first == "data: 1"
    error = json.loads(last.removeprefix("data: "))["error"]
    assert (error["type"], error["code"], error["param"]) == (type_, code, None)
    assert "secret" not in error["message"]
    assert len(backend.calls) == 1


async def test_a_failure_in_a_json_body_aborts_the_connection() -> None:
    backend = ScriptedBackend([[JSON_START, chunk(b'{"a":')], ReplicaLost()])
    with pytest.raises(ConnectionAbortedError):
        await client(backend).post("/v1/completions")


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


async def test_a_client_that_leaves_closes_the_backend_stream(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    backend = ScriptedBackend([[SSE_START], asyncio.Event()])
    connection = Connection(backend)
    exchange = connection.start()
    await connection.started.wait()
    connection.leave()
    async with asyncio.timeout(60):
        await exchange
    assert backend.closed.is_set()
    assert "status=200" in caplog.text
    assert "outcome=client disconnected" in caplog.text


async def test_a_client_that_leaves_before_its_body_is_complete_starts_nothing() -> None:
    backend = ScriptedBackend()
    connection = Connection(backend)
    connection.leave()
    exchange = connection.start(more_body=True)
    async with asyncio.timeout(60):
        await exchange
    assert (backend.calls, connection.sent) == ([], [])


async def test_a_cancelled_request_cancels_the_backend_stream() -> None:
    backend = ScriptedBackend([[SSE_START], asyncio.Event()])
    connection = Connection(backend)
    exchange = connection.start()
    await connection.started.wait()
    exchange.cancel()
    with pytest.raises(asyncio.CancelledError):
        await exchange
    assert backend.closed.is_set()


async def test_each_request_is_logged_with_its_outcome(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    response = await client(ScriptedBackend([WHOLE])).post("/v1/completions")
    (line,) = [one.message for one in caplog.records if one.name == "test"]
    assert line.startswith(
        f"request_id={response.headers['x-request-id']} method=POST path=/v1/completions status=200"
    )
    assert line.endswith("outcome=ok")


async def test_fields_that_asgi_leaves_optional_may_be_missing() -> None:
    # The last part of a body may have neither a body nor `more_body`, a start no headers.
    backend = ScriptedBackend(
        [[{"type": "http.response.start", "status": 204}, {"type": "http.response.body"}]]
    )
    connection = Connection(backend)
    await connection.start()
    start, end = connection.sent
    assert (start["status"], end) == (204, {"type": "http.response.body"})
    assert backend.calls[0][1] == b""


async def test_messages_after_the_request_are_no_disconnect() -> None:
    release = asyncio.Event()
    backend = ScriptedBackend([[SSE_START], release, [chunk(b"", more=False)]])
    connection = Connection(backend)
    exchange = connection.start()
    connection.incoming.put_nowait({"type": "http.request", "body": b"", "more_body": False})
    await connection.started.wait()
    release.set()
    async with asyncio.timeout(60):
        await exchange
    assert len(connection.sent) == 2
