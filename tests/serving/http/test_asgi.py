"""One request against an ASGI app, as batches of messages."""

import asyncio
from contextlib import aclosing
from typing import Any

import pytest

from adakv_serve.serving.http.asgi import (
    Message,
    Receive,
    Scope,
    Send,
    body_of,
    call_app,
    header,
    is_event_stream,
    is_last,
    portable_scope,
    run_lifespan,
)

SCOPE: dict[str, Any] = {"type": "http", "method": "POST", "path": "/", "headers": []}


async def _start(send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})


async def _body(send: Send, data: bytes, more: bool) -> None:
    await send({"type": "http.response.body", "body": data, "more_body": more})


async def test_the_body_goes_in_and_the_response_comes_out() -> None:
    async def echo(scope: Scope, receive: Receive, send: Send) -> None:
        message = await receive()
        await _start(send)
        await _body(send, message["body"][::-1], False)

    messages = [m async for batch in call_app(echo, SCOPE, b"abc") for m in batch]
    assert [message["type"] for message in messages] == [
        "http.response.start",
        "http.response.body",
    ]
    assert messages[1]["body"] == b"cba"


async def test_waiting_chunks_are_joined_into_one() -> None:
    async def burst(scope: Scope, receive: Receive, send: Send) -> None:
        await _start(send)
        for chunk in (b"a", b"b", b"c"):
            await _body(send, chunk, True)
        await _body(send, b"", False)

    batches = [batch async for batch in call_app(burst, SCOPE, b"")]
    bodies = [m for batch in batches for m in batch if m["type"] == "http.response.body"]
    assert b"".join(m["body"] for m in bodies) == b"abc"
    assert len(bodies) < 4
    assert bodies[-1]["more_body"] is False


async def test_any_number_of_messages_arrives_in_order() -> None:
    async def many(scope: Scope, receive: Receive, send: Send) -> None:
        await _start(send)
        for number in range(1000):
            await _body(send, b"%d," % number, True)
        await _body(send, b"", False)

    messages = [m async for batch in call_app(many, SCOPE, b"") for m in batch]
    body = b"".join(m.get("body", b"") for m in messages)
    assert body == b"".join(b"%d," % number for number in range(1000))


async def test_closing_early_is_a_disconnect_before_it_is_a_cancellation() -> None:
    seen: list[str] = []
    ended = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await _start(send)
        try:
            seen.append((await receive())["type"])
        except asyncio.CancelledError:
            seen.append("cancelled")
            raise
        finally:
            ended.set()

    async with aclosing(call_app(app, SCOPE, b"")) as batches:
        await anext(batches)
    async with asyncio.timeout(60):
        await ended.wait()
    assert seen == ["http.disconnect"]


async def test_an_exception_of_the_app_reaches_the_caller() -> None:
    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        await _start(send)
        raise RuntimeError("broken")

    batches = call_app(broken, SCOPE, b"")
    assert [message["type"] for message in await anext(batches)] == ["http.response.start"]
    with pytest.raises(RuntimeError, match="broken"):
        await anext(batches)


async def test_an_app_that_ignores_the_disconnect_is_cancelled() -> None:
    cancelled = asyncio.Event()

    async def deaf(scope: Scope, receive: Receive, send: Send) -> None:
        await _start(send)
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    async with aclosing(call_app(deaf, SCOPE, b"", grace_s=0)) as batches:
        await anext(batches)
    async with asyncio.timeout(60):
        await cancelled.wait()


async def test_an_app_waits_for_a_slow_reader() -> None:
    sent: list[int] = []

    async def eager(scope: Scope, receive: Receive, send: Send) -> None:
        await _start(send)
        for number in range(10_000):
            await _body(send, b"x", True)
            sent.append(number)
        await _body(send, b"", False)

    async with aclosing(call_app(eager, SCOPE, b"")) as batches:
        await anext(batches)
        assert len(sent) < 1000
        async for _ in batches:
            pass
    assert len(sent) == 10_000


async def test_an_app_that_goes_on_sending_after_the_disconnect_is_not_blocked() -> None:
    ended = asyncio.Event()

    async def talkative(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await _start(send)
        await receive()
        for _ in range(1000):
            await _body(send, b"x", True)
        ended.set()

    async with aclosing(call_app(talkative, SCOPE, b"")) as batches:
        await anext(batches)
    async with asyncio.timeout(60):
        await ended.wait()


async def test_an_app_without_a_response_yields_nothing() -> None:
    async def silent(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()

    assert [batch async for batch in call_app(silent, SCOPE, b"")] == []


def test_a_portable_scope_has_the_request_and_nothing_of_the_server() -> None:
    request = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "GET",
        "scheme": "http", "path": "/a", "raw_path": b"/a", "query_string": b"b=c",
        "root_path": "/r", "headers": [(b"d", b"e")], "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
    }  # fmt: skip
    scope = {**request, "app": object(), "state": {}, "extensions": {}}
    assert portable_scope(scope) == request
    assert portable_scope({"type": "http"}) == {"type": "http"}


async def test_start_and_end_of_the_server_are_confirmed() -> None:
    incoming = iter([{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}])
    sent: list[Message] = []

    async def receive() -> Message:
        return next(incoming)

    async def send(message: Message) -> None:
        sent.append(message)

    await run_lifespan(receive, send)
    assert [message["type"] for message in sent] == [
        "lifespan.startup.complete",
        "lifespan.shutdown.complete",
    ]


def test_optional_fields_of_messages_have_defaults() -> None:
    assert (body_of({}), is_last({}), header({}, b"a")) == (b"", True, b"")
    assert (body_of({"body": b"b"}), is_last({"more_body": True})) == (b"b", False)
    assert is_last({"more_body": False})
    assert header({"headers": [(b"x", b"1"), (b"a", b"2")]}, b"a") == b"2"


@pytest.mark.parametrize(
    ("kind", "expected"),
    [(b"text/event-stream", True), (b"text/event-stream; charset=utf-8", True),
     (b"application/json", False), (b"text/plain", False)],
)  # fmt: skip
def test_event_streams_are_recognized_by_their_content_type(kind: bytes, expected: bool) -> None:
    assert is_event_stream({"headers": [(b"content-type", kind)]}) is expected
    assert not is_event_stream({"headers": []})


async def test_chunks_without_optional_fields_are_joined() -> None:
    async def terse(scope: Scope, receive: Receive, send: Send) -> None:
        await _start(send)
        await send({"type": "http.response.body", "more_body": True})
        await send({"type": "http.response.body", "body": b"a", "more_body": True})
        await send({"type": "http.response.body"})

    (batch,) = [batch async for batch in call_app(terse, SCOPE, b"")]
    assert batch[1:] == [{"type": "http.response.body", "body": b"a", "more_body": False}]
