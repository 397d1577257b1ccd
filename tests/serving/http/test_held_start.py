"""Streams that are refused before their first event, with a small app in place of vLLM's."""

import json
import logging
from collections.abc import AsyncGenerator, Callable
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.middleware.exceptions import ExceptionMiddleware

from adakv_serve.serving.http.asgi import Message, Receive, Scope, Send, call_app
from adakv_serve.serving.http.door_settings import FrontDoorSettings
from adakv_serve.serving.http.failures import ReplicaLost
from adakv_serve.serving.http.front_door import FrontDoor
from adakv_serve.serving.http.held_start import HeldStart

REFUSED = {"error": {"message": "no", "type": "BadRequestError", "param": "p", "code": 400}}
CREATED = {"type": "response.created", "response": {}}
TEXT = {"choices": [{"text": "a", "finish_reason": None}]}


def _event(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data).encode() + b"\n\n"


def _app(*pieces: bytes | Exception, media_type: str = "text/event-stream") -> Any:
    """Return an app that answers with the pieces and raises those that are exceptions."""
    app = FastAPI()

    @app.post("/")
    async def answer() -> Any:
        async def stream() -> Any:
            for piece in pieces:
                if isinstance(piece, Exception):
                    raise piece
                yield piece

        return StreamingResponse(stream(), media_type=media_type, headers={"x-other": "kept"})

    @app.exception_handler(ValueError)
    async def refused(_: Any, error: Exception) -> JSONResponse:
        return JSONResponse({"error": {"message": str(error), "code": 400}}, 400)

    app.middleware_stack = app.build_middleware_stack()
    layer: Any = app.middleware_stack
    while not isinstance(layer, ExceptionMiddleware):
        layer = layer.app
    layer.app = HeldStart(layer.app)
    return app


async def _post(app: Any) -> httpx.Response:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://app") as client:
        return await client.post("/")


async def test_a_stream_that_begins_with_an_error_has_its_status_and_is_json() -> None:
    response = await _post(_app(_event(REFUSED), b"data: [DONE]\n\n"))
    assert response.status_code == 400
    assert response.json() == REFUSED
    assert response.headers.get_list("content-type") == ["application/json"]
    assert response.headers["x-other"] == "kept"
    assert int(response.headers["content-length"]) == len(response.content)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        ({"type": "BadRequestError", "message": "no"}, 400),
        ({"type": "NotFoundError", "message": "no"}, 404),
        ({"type": "internal_error", "message": "no"}, 500),
        ({"type": "overloaded", "code": "busy"}, 500),
        ({"type": "overloaded", "code": 429}, 429),
    ],
)
async def test_an_error_without_a_status_has_that_of_its_type(error: Any, status: int) -> None:
    whole = {"type": "error", "error": error}
    response = await _post(_app(b"event: error\n" + _event(whole)))
    assert (response.status_code, response.json()) == (status, whole)


async def test_events_before_the_engines_first_are_held_too() -> None:
    response = await _post(_app(_event(CREATED), _event(REFUSED)))
    assert response.status_code == 400
    response = await _post(_app(_event(CREATED), _event({"type": "response.failed"})))
    assert (response.status_code, response.content.count(b"data: ")) == (200, 2)


async def test_an_exception_before_the_first_event_gets_the_answer_of_its_handler() -> None:
    response = await _post(_app(_event(CREATED), ValueError("bad pattern")))
    assert response.status_code == 400
    assert response.json()["error"]["message"] == "bad pattern"


async def test_an_error_after_the_first_event_stays_in_the_stream() -> None:
    pieces = [_event(TEXT), _event(REFUSED)]
    response = await _post(_app(*pieces))
    assert response.status_code == 200
    assert response.content == b"".join(pieces)


@pytest.mark.parametrize("pieces", [[], [b": keep-alive\n\n", _event(TEXT)], [b"data: [DONE]\n\n"]])
async def test_other_streams_pass_unchanged(pieces: list[bytes]) -> None:
    response = await _post(_app(*pieces))
    assert (response.status_code, response.content) == (200, b"".join(pieces))


async def test_an_event_may_come_in_parts() -> None:
    whole = _event(REFUSED)
    response = await _post(_app(whole[:20], whole[20:]))
    assert response.status_code == 400


async def test_other_responses_than_event_streams_are_not_held() -> None:
    response = await _post(_app(_event(REFUSED), media_type="text/plain"))
    assert response.status_code == 200


@pytest.mark.parametrize("code", [200, 399, 600, "400"])
async def test_a_code_that_is_no_error_status_is_ignored(code: Any) -> None:
    error = {"error": {"message": "no", "type": "NotFoundError", "code": code}}
    assert (await _post(_app(_event(error)))).status_code == 404


async def _sent_through(app: Any, scope: Scope) -> list[Message]:
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "websocket.connect"}

    async def send(message: Message) -> None:
        sent.append(message)

    await HeldStart(app)(scope, receive, send)
    return sent


async def test_a_refusal_is_a_whole_response_and_nothing_follows_it() -> None:
    async def refusing(scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for _ in range(3):
            await send({"type": "http.response.body", "body": _event(REFUSED), "more_body": True})
        await send({"type": "http.response.body"})

    start, body = await _sent_through(refusing, {"type": "http"})
    assert (start["status"], start["type"]) == (400, "http.response.start")
    assert body["type"] == "http.response.body"
    assert (json.loads(body["body"]), body["more_body"]) == (REFUSED, False)


async def test_a_stream_that_ends_without_a_body_passes() -> None:
    start: Message = {
        "type": "http.response.start",
        "status": 200,
        "headers": [(b"content-type", b"text/event-stream")],
    }

    async def empty(scope: Scope, receive: Receive, send: Send) -> None:
        await send(start)
        await send({"type": "http.response.body"})

    assert await _sent_through(empty, {"type": "http"}) == [
        start,
        {"type": "http.response.body", "body": b""},
    ]


async def test_other_connections_pass_untouched() -> None:
    async def echo(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": scope["type"], "heard": (await receive())["type"]})

    assert await _sent_through(echo, {"type": "websocket"}) == [
        {"type": "websocket", "heard": "websocket.connect"}
    ]


class _Died(Exception):
    pass


class _Replicas:
    """A backend whose first replica starts to answer and dies in prefill."""

    def __init__(self) -> None:
        self._apps = [HeldStart(_dies_in_prefill), _app(_event(TEXT))]
        self.calls = 0

    async def stream(
        self, scope: Scope, body: bytes, pay: Callable[[int], None]
    ) -> AsyncGenerator[list[Message], None]:
        self.calls += 1
        try:
            async for batch in call_app(self._apps[self.calls - 1], scope, body):
                yield batch
        except _Died:
            raise ReplicaLost from None

    async def ping(self) -> None: ...


async def _dies_in_prefill(scope: Scope, receive: Receive, send: Send) -> None:
    headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    raise _Died


async def test_a_stream_whose_replica_dies_in_prefill_is_retried() -> None:
    replicas = _Replicas()
    response = await _post(FrontDoor(replicas, FrontDoorSettings(), logging.getLogger("test")))
    assert (response.status_code, response.content) == (200, _event(TEXT))
    assert replicas.calls == 2
