"""Proofs in responses, with a small app in place of vLLM's."""

import json
from collections.abc import Iterable
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

from serving.http.answer_proofs import current_answer
from serving.http.compression_proof import ProofMiddleware
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
