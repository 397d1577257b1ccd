"""The front door before a backend that fails in every way a replica can, and clients that leave."""

import asyncio
import json
import logging

import anthropic
import httpx2
import pytest

from adakv_serve.serving.http.failures import NoReplica, Overloaded, ReplicaFault, ReplicaLost
from tests.serving.http.scripted_backend import (
    JSON_START,
    SSE_START,
    WHOLE,
    Connection,
    ScriptedBackend,
    chunk,
    client,
    door_and_client,
    error_of,
    messages_of_the_door,
)

QUEUE_FULL = "too many requests are waiting for a replica"


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


async def test_a_replicas_traceback_is_logged_under_the_requests_id(
    caplog: pytest.LogCaptureFixture,
) -> None:
    fault = ReplicaFault('File "core.py", line 3, in step\nKeyError: secret')
    backend = ScriptedBackend([fault])
    headers = {"x-request-id": "mine"}
    response = await client(backend).post("/v1/completions", headers=headers)
    assert (response.status_code, len(backend.calls)) == (500, 1)
    assert "secret" not in response.text
    (record,) = [one for one in caplog.records if one.exc_info]
    assert record.getMessage() == "request_id=mine failed"
    assert "line 3, in step" in caplog.text


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


async def test_anthropics_client_raises_when_a_stream_breaks() -> None:
    text = {
        "type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "half"},
    }  # fmt: skip
    event = b"event: content_block_delta\ndata: " + json.dumps(text).encode() + b"\n\n"
    backend = ScriptedBackend([[SSE_START, chunk(event)], ReplicaLost()])
    door, _ = door_and_client(backend)
    inside = httpx2.AsyncClient(transport=httpx2.ASGITransport(app=door))
    asked = anthropic.AsyncAnthropic(
        api_key="none", base_url="http://door", http_client=inside, max_retries=0
    )
    stream = await asked.messages.create(
        model="llm", max_tokens=5, messages=[{"role": "user", "content": "?"}], stream=True
    )
    assert (await anext(stream)).type == "content_block_delta"
    with pytest.raises(anthropic.APIStatusError, match="the replica that worked on this"):
        await anext(stream)


@pytest.mark.parametrize(
    ("given", "passed"),
    [(b"3", b"3"), (b"-9223372036854775808", b"-9223372036854775808"), (b"1" + b"0" * 20, None)],
)
async def test_a_priority_that_vllm_cannot_send_does_not_reach_it(
    given: bytes, passed: bytes | None
) -> None:
    backend = ScriptedBackend([WHOLE])
    headers = {"x-vllm-priority": given.decode()}
    assert (await client(backend).post("/v1/completions", headers=headers)).status_code == 200
    ((scope, _),) = backend.calls
    assert dict(scope["headers"]).get(b"x-vllm-priority") == passed


async def test_a_failure_in_a_json_body_aborts_the_connection() -> None:
    backend = ScriptedBackend([[JSON_START, chunk(b'{"a":')], ReplicaLost()])
    with pytest.raises(ConnectionAbortedError):
        await client(backend).post("/v1/completions")


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
        f"request_id={response.headers['x-request-id']} key=- method=POST path=/v1/completions "
        "status=200"
    )
    assert line.endswith("outcome=ok")


async def test_a_stream_that_breaks_off_is_logged_as_broken(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    backend = ScriptedBackend([[SSE_START, chunk(b"data: {}\n\n")], ReplicaLost()])
    await client(backend).post("/v1/completions")
    assert messages_of_the_door(caplog)[-1].endswith("outcome=broken off, ReplicaLost")


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


async def test_an_overdue_request_is_504_and_its_generation_ends() -> None:
    backend = ScriptedBackend([asyncio.Event()])
    async with asyncio.timeout(60):
        response = await client(backend, request_deadline_s=0.01).post("/v1/completions")
    assert response.status_code == 504
    error = error_of(response)
    assert error["type"] == "GatewayTimeout"
    assert error["message"] == "the answer was not complete within 0.01 s"
    assert backend.closed.is_set()


async def test_an_overdue_stream_ends_with_an_error_event() -> None:
    backend = ScriptedBackend([[SSE_START, chunk(b"data: 1\n\n")], asyncio.Event()])
    async with asyncio.timeout(60):
        response = await client(backend, request_deadline_s=0.01).post("/v1/completions")
    assert response.status_code == 200
    first, last = response.text.strip().split("\n\n")
    assert first == "data: 1"
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == 504
    assert backend.closed.is_set()


async def test_half_an_overdue_body_closes_the_connection() -> None:
    backend = ScriptedBackend([[JSON_START, chunk(b"{")], asyncio.Event()])
    async with asyncio.timeout(60):
        with pytest.raises(ConnectionAbortedError, match="not complete"):
            await client(backend, request_deadline_s=0.01).post("/v1/completions")
    assert backend.closed.is_set()
