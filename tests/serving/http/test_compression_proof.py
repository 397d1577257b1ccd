"""Proofs in responses, with a small app in place of vLLM's."""

import json
from collections.abc import Iterable
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

from adakv_serve.serving.http.answer_proofs import current_answer
from adakv_serve.serving.http.compression_proof import ProofMiddleware
from tests.adakv_worker.proofs import make_proof

NOTED = [make_proof(kept_mean=10.0 * (1 + index)) for index in range(2)]
PROOFS = [proof.as_json() for proof in NOTED]
SUMMARY = make_proof(kept_mean=15.0).as_json()
EVENTS = {
    "chat": [
        {"choices": [{"index": 0, "delta": {"content": "a"}, "finish_reason": None}]},
        {"choices": [{"index": 0, "delta": {"content": "b"}, "finish_reason": "stop"}]},
        {"choices": [{"index": 1, "delta": {"content": "c"}, "finish_reason": "length"}]},
        {"choices": [], "usage": {"total_tokens": 3}},
    ],
    "responses": [
        {"type": "response.created", "response": {"status": "in_progress"}},
        {"type": "response.output_text.delta", "delta": "a"},
        {"type": "response.completed", "response": {"status": "completed"}},
    ],
    "messages": [
        {"type": "message_start", "message": {}},
        {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {}},
        {"type": "message_stop"},
    ],
}


def _note(choices: int) -> None:
    if (answer := current_answer()) is not None and choices:
        answer.expect("prompt", choices)
        for choice in reversed(range(choices)):
            answer.note("prompt", choice, NOTED[choice])


def _written(events: Iterable[dict[str, Any]]) -> bytes:
    stream = "".join(
        f"event: {event.get('type')}\ndata: {json.dumps(event, separators=(',', ':'))}\n\n"
        for event in events
    )
    return stream.encode() + b"data: [DONE]\n\n"


@pytest.fixture
def client() -> httpx.AsyncClient:
    app = FastAPI()

    @app.post("/answer")
    async def answer(request: Request) -> Any:
        wanted = await request.json()
        _note(wanted["n"])
        return JSONResponse(wanted["body"], wanted.get("status", 200))

    @app.post("/stream")
    async def stream(request: Request) -> Any:
        wanted = await request.json()

        async def pieces() -> Any:
            _note(wanted["n"])
            written = _written(EVENTS[wanted["kind"]])
            size = wanted.get("piece", len(written))
            for start in range(0, len(written), size):
                yield written[start : start + size]

        return StreamingResponse(pieces(), media_type="text/event-stream")

    transport = httpx.ASGITransport(ProofMiddleware(app))
    return httpx.AsyncClient(transport=transport, base_url="http://app")


def _events(response: httpx.Response) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in response.text.split("\n")]
    return [json.loads(line) for line in lines if line.startswith("{")]


def _without_proofs(event: dict[str, Any]) -> dict[str, Any]:
    event = {key: value for key, value in event.items() if key != "kv_compression"}
    if response := event.get("response"):
        event["response"] = _without_proofs(response)
    if choices := event.get("choices"):
        event["choices"] = [_without_proofs(choice) for choice in choices]
    return event


async def test_a_whole_answer_has_each_choices_proof_and_their_summary(
    client: httpx.AsyncClient,
) -> None:
    body = {"choices": [{"index": 1}, {"index": 0}], "kv_transfer_params": {"other": 2}}
    response = await client.post("/answer", json={"n": 2, "body": body})
    assert response.json() == {
        "choices": [
            {"index": 1, "kv_compression": PROOFS[1]},
            {"index": 0, "kv_compression": PROOFS[0]},
        ],
        "kv_transfer_params": {"other": 2},
        "kv_compression": SUMMARY,
    }
    assert int(response.headers["content-length"]) == len(response.content)


async def test_a_single_choices_proof_equals_the_summary(client: httpx.AsyncClient) -> None:
    response = await client.post("/answer", json={"n": 1, "body": {"choices": [{"index": 0}]}})
    answer = response.json()
    assert answer["kv_compression"] == answer["choices"][0]["kv_compression"] == PROOFS[0]


async def test_an_answer_without_choices_has_the_proof_at_the_top(
    client: httpx.AsyncClient,
) -> None:
    response = await client.post("/answer", json={"n": 1, "body": {"content": []}})
    assert response.json() == {"content": [], "kv_compression": PROOFS[0]}


@pytest.mark.parametrize("piece", [1, 7, 100_000])
async def test_a_chat_stream_has_proofs_where_choices_end_and_beside_the_usage(
    client: httpx.AsyncClient, piece: int
) -> None:
    response = await client.post("/stream", json={"n": 2, "kind": "chat", "piece": piece})
    events = _events(response)
    places = [
        [choice.get("kv_compression") for choice in event["choices"]] or event["kv_compression"]
        for event in events
    ]
    assert places == [[None], [PROOFS[0]], [PROOFS[1]], SUMMARY]
    assert [_without_proofs(event) for event in events] == EVENTS["chat"]
    assert not any("kv_compression" in event for event in events[:-1])
    assert response.text.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize(
    ("kind", "place"), [("responses", ("response.completed", "response")), ("messages", None)]
)
async def test_other_streams_have_the_proof_in_the_event_that_closes_the_answer(
    client: httpx.AsyncClient, kind: str, place: tuple[str, str] | None
) -> None:
    response = await client.post("/stream", json={"n": 1, "kind": kind})
    events = _events(response)
    assert response.text.count("kv_compression") == 1
    closing = events[-1]["response"] if place else events[-2]
    assert closing["kv_compression"] == PROOFS[0]
    assert [_without_proofs(event) for event in events] == EVENTS[kind]
    assert f"event: {events[0]['type']}\n" in response.text


async def test_without_proof_or_success_nothing_changes(client: httpx.AsyncClient) -> None:
    for wanted in ({"n": 0}, {"n": 1, "status": 400}):
        response = await client.post("/answer", json={"body": {"choices": []}, **wanted})
        assert response.json() == {"choices": []}
    for kind, events in EVENTS.items():
        response = await client.post("/stream", json={"n": 0, "kind": kind})
        assert response.content == _written(events)


async def _through(scope: dict[str, Any], *messages: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what arrives of the messages that an app behind the middleware sends."""
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "test.received"}

    async def send(message: Any) -> None:
        sent.append(message)

    async def sending(scope: Any, receive: Any, send: Any) -> None:
        assert (await receive())["type"] == "test.received"
        _note(1)
        for message in messages:
            await send(message)

    await ProofMiddleware(sending)(scope, receive, send)
    return sent


JSON_START = {
    "type": "http.response.start",
    "status": 200,
    "headers": [(b"content-type", b"application/json"), (b"content-length", b"2")],
}


@pytest.mark.parametrize(
    "scope",
    [{"type": "websocket"}, {"type": "lifespan"}, {"type": "http", "method": "GET"}],
)
async def test_only_posts_get_proofs(scope: dict[str, Any]) -> None:
    messages = [JSON_START, {"type": "http.response.body", "body": b"{}"}]
    assert await _through(scope, *messages) == messages


async def test_a_json_answer_in_parts_gets_its_proof_at_the_end() -> None:
    start, body = await _through(
        {"type": "http", "method": "POST"}, JSON_START,
        {"type": "http.response.body", "body": b'{"a', "more_body": True},
        {"type": "http.response.body", "body": b'": 1}', "more_body": True},
        {"type": "http.response.body"},
    )  # fmt: skip
    answer = json.loads(body["body"])
    assert (answer["a"], set(answer)) == (1, {"a", "kv_compression"})
    assert dict(start["headers"])[b"content-length"] == str(len(body["body"])).encode()
    assert len(start["headers"]) == 2


async def test_json_that_is_no_object_stays() -> None:
    _, body = await _through(
        {"type": "http", "method": "POST"}, JSON_START,
        {"type": "http.response.body", "body": b"[1]"},
    )  # fmt: skip
    assert body["body"] == b"[1]"


async def test_other_messages_pass_at_once() -> None:
    trailers = {"type": "http.response.trailers"}
    assert await _through({"type": "http", "method": "POST"}, trailers) == [trailers]


async def test_the_rest_of_a_stream_goes_out_with_its_last_message() -> None:
    start = {"type": "http.response.start", "status": 200}
    half = b'data: {"choices":'
    *_, first, last = await _through(
        {"type": "http", "method": "POST"}, start,
        {"type": "http.response.body", "body": half, "more_body": True},
        {"type": "http.response.body"},
    )  # fmt: skip
    assert (first["body"], last["body"]) == (b"", half)


@pytest.mark.parametrize("kind", ["response.completed", "response.incomplete", "response.failed"])
async def test_however_a_response_ends_its_last_event_has_the_proof(kind: str) -> None:
    start = {"type": "http.response.start", "status": 200}
    event = b'data: {"type":"%s","response":{"text":"\xc3\xa9"}}\n\n' % kind.encode()
    _, body = await _through(
        {"type": "http", "method": "POST"}, start, {"type": "http.response.body", "body": event}
    )
    data = json.loads(body["body"].removeprefix(b"data: "))
    assert data["response"].pop("kv_compression") is not None
    assert data == {"type": kind, "response": {"text": "\xe9"}}
    assert b"\xc3\xa9" in body["body"]
