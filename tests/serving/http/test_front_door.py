"""The front door before a backend that works: limits, health, paths, whole requests."""

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import quote

import httpx
import pytest
import vllm

from adakv_serve.serving.http.asgi import Message, is_last
from adakv_serve.serving.http.door_settings import FrontDoorSettings
from adakv_serve.serving.http.failures import NoReplica, Overloaded, ReplicaLost
from adakv_serve.serving.http.front_door import FrontDoor
from tests.serving.http.scripted_backend import (
    WHOLE,
    Clock,
    ScriptedBackend,
    client,
    error_of,
    messages_of_the_door,
)


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


async def test_a_replica_gets_the_whole_request() -> None:
    backend = ScriptedBackend([WHOLE])
    headers = {"x-custom": "kept", "content-encoding": "identity"}
    await client(backend).put("/v1/models/a%2Fb?limit=3&after=x", content=b"in", headers=headers)
    scope, body = backend.calls[0]
    assert (scope["method"], scope["path"], body) == ("PUT", "/v1/models/a/b", b"in")
    assert scope["query_string"] == b"limit=3&after=x"
    assert scope["raw_path"] == b"/v1/models/a%2Fb"
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
    error = error_of(response)
    assert error["type"] == "UnsupportedMediaType"
    assert "'gzip'" in error["message"]
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


@pytest.mark.parametrize("path", ["/version", "/health"])
@pytest.mark.parametrize("method", ["POST", "OPTIONS", "DELETE"])
async def test_an_open_path_takes_no_other_method(path: str, method: str) -> None:
    backend = ScriptedBackend()
    response = await client(backend, api_keys=("right",)).request(method, path, content=b"body")
    assert response.status_code == 405
    assert response.headers["allow"] == "GET, HEAD"
    assert backend.calls == []


async def test_what_comes_to_an_open_path_reaches_no_engine() -> None:
    backend = ScriptedBackend()
    response = await client(backend, api_keys=("right",)).request(
        "GET", "/version", content=b"x" * 1000
    )
    assert (response.status_code, response.json()) == (200, {"version": vllm.__version__})
    assert backend.calls == []


async def test_all_probes_share_one_ping() -> None:
    backend = ScriptedBackend(ping=(answers := asyncio.Event()))
    door = client(backend, health_timeout_s=60)
    probes = [asyncio.create_task(door.get("/health")) for _ in range(50)]
    # A cancelled probe does not cancel the ping of the others.
    await asyncio.wait_for(backend.pinged.acquire(), 60)
    probes.pop().cancel()
    answers.set()
    assert {probe.status_code for probe in await asyncio.gather(*probes)} == {200}
    assert backend.pinged.locked()


async def test_a_client_that_goes_with_the_last_part_does_not_end_its_source() -> None:
    backend = ScriptedBackend([WHOLE, (more := asyncio.Event())])
    sent: list[Message] = []
    request: list[Message] = [{"type": "http.request", "body": b"", "more_body": False}]
    complete = asyncio.Event()

    async def receive() -> Message:
        if request:
            return request.pop()
        await complete.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)
        if is_last(message):
            complete.set()
            asyncio.get_running_loop().call_later(0.01, more.set)

    door = FrontDoor(backend, FrontDoorSettings(), logging.getLogger("test"))
    scope = {
        "type": "http", "method": "GET", "path": "/v1/models", "headers": [],
        "query_string": b"", "http_version": "1.1",
    }  # fmt: skip
    async with asyncio.timeout(60):
        await door(scope, receive, send)
    assert backend.ended == ["whole"]
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]


@pytest.mark.parametrize(
    "path",
    [
        "/sleep", "/wake_up", "/collective_rpc", "/reset_prefix_cache", "/v1/load_lora_adapter",
        "/start_profile", "/scale_elastic_ep", "/v1", "/v1/modelsx", "//v1/models", "/server_info",
    ],
)  # fmt: skip
async def test_what_acts_on_one_replica_is_closed(path: str) -> None:
    backend = ScriptedBackend()
    response = await client(backend).post(path)
    assert response.status_code == 404
    assert "ingress.more_paths" in error_of(response)["message"]
    assert backend.calls == []


async def test_an_operator_opens_an_endpoint() -> None:
    door = client(
        ScriptedBackend([WHOLE], [WHOLE]), more_paths=("/v1/load_lora_adapter", "/sleep/")
    )
    assert (await door.post("/v1/load_lora_adapter")).status_code == 200
    assert (await door.post("/sleep")).status_code == 200
    assert (await door.post("/wake_up")).status_code == 404


@pytest.mark.parametrize("length", ["9" * 5000, "-1", "+5", "1_0", "five", "\u00b2"])
async def test_a_senseless_length_is_413(length: str) -> None:
    backend = ScriptedBackend()
    headers = [(b"content-length", length.encode("latin-1"))]
    scope = {
        "type": "http", "method": "POST", "path": "/v1/completions", "headers": headers,
        "query_string": b"", "http_version": "1.1",
    }  # fmt: skip
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": b"{}", "more_body": False}

    async def send(message: Message) -> None:
        sent.append(message)

    await FrontDoor(backend, FrontDoorSettings(), logging.getLogger("test"))(scope, receive, send)
    assert sent[0]["status"] == 413
    assert backend.calls == []


@pytest.mark.parametrize(
    "character", ["\r\n", "\n", "\0", "\x1b", "\x85", "\u2028", "\x7f", "\u202e"]
)
async def test_a_path_is_one_line_of_the_log(
    character: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "test")
    door = client(ScriptedBackend([WHOLE]))
    await door.post(f"/v1/completions/{quote(character)}INFO request_id=forged")
    (message,) = messages_of_the_door(caplog)
    assert len(message.splitlines()) == 1
    assert not set(character) & set(message)
    assert message.startswith("request_id=")


async def test_a_long_path_is_cut_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "test")
    await client(ScriptedBackend([WHOLE])).post("/v1/completions/" + "x" * 5000)
    assert len(messages_of_the_door(caplog)[0]) < 1000


def _mounted(backend: ScriptedBackend, prefix: str, **settings: Any) -> httpx.AsyncClient:
    """A client of a door below a route prefix, as Serve calls it: the path has the prefix, too."""
    door = FrontDoor(backend, FrontDoorSettings(**settings), logging.getLogger("test"), Clock())
    transport = httpx.ASGITransport(app=door, root_path=prefix)
    return httpx.AsyncClient(transport=transport, base_url=f"http://door{prefix}")


@pytest.mark.parametrize("prefix", ["/small", "/v1", "/health"])
async def test_below_a_route_prefix_the_same_paths_are_open(prefix: str) -> None:
    backend = ScriptedBackend([WHOLE], [WHOLE])
    door = _mounted(backend, prefix, api_keys=("k",))
    assert (await door.get("/health")).status_code == 200
    assert (await door.get("/version")).status_code == 200
    assert (await door.get("/v1/models")).status_code == 401
    headers = {"authorization": "Bearer k"}
    assert (await door.get("/sleep", headers=headers)).status_code == 404
    assert (await door.get("/metrics", headers=headers)).status_code == 404
    assert (await door.get("/v1/models", headers=headers)).status_code == 200
    # The engine's app finds its route by both.
    scope, _ = backend.calls[-1]
    assert (scope["root_path"], scope["path"]) == (prefix, f"{prefix}/v1/models")


@pytest.mark.parametrize("path", ["/small", "/smaller/health", "/other/health"])
async def test_only_the_health_of_the_door_itself_needs_no_key(path: str) -> None:
    door = FrontDoor(
        ScriptedBackend(), FrontDoorSettings(api_keys=("k",)), logging.getLogger("test"), Clock()
    )
    transport = httpx.ASGITransport(app=door, root_path="/small")
    async with httpx.AsyncClient(transport=transport, base_url="http://door") as client:
        assert (await client.get(path)).status_code == 401
