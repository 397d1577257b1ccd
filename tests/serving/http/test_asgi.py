import asyncio
from contextlib import aclosing
from typing import Any

import pytest

from serving.http.asgi import Receive, Scope, Send, call_app

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

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await _start(send)
        try:
            seen.append((await receive())["type"])
        except asyncio.CancelledError:
            seen.append("cancelled")
            raise

    async with aclosing(call_app(app, SCOPE, b"")) as batches:
        await anext(batches)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert seen == ["http.disconnect"]


async def test_an_exception_of_the_app_reaches_the_caller() -> None:
    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        await _start(send)
        raise RuntimeError("broken")

    batches = call_app(broken, SCOPE, b"")
    assert [message["type"] for message in await anext(batches)] == ["http.response.start"]
    with pytest.raises(RuntimeError, match="broken"):
        await anext(batches)
