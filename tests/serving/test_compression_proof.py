"""The proof's way into responses, through a small app that stands where vLLM's does."""

import json
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

from serving.compression_proof import ProofMiddleware, noting

PROOFS = [{"policy": "ada_snapkv", "choice": index} for index in range(2)]


async def _generate(choices: int) -> Any:
    for index in reversed(range(choices)):
        yield SimpleNamespace(
            kv_transfer_params={"kv_compression": PROOFS[index]},
            outputs=[SimpleNamespace(index=index)],
        )


@pytest.fixture
def client() -> httpx.AsyncClient:
    app = FastAPI()
    generate = noting(_generate)

    @app.post("/answer")
    async def answer(request: Request) -> Any:
        wanted = await request.json()
        async for _ in generate(wanted["n"]):
            pass
        status = wanted.get("status", 200)
        return JSONResponse({"kv_transfer_params": {"kv_compression": 1, "other": 2}}, status)

    @app.post("/stream")
    async def stream(request: Request) -> Any:
        wanted = await request.json()

        async def events() -> Any:
            async for _ in generate(wanted["n"]):
                yield 'data: {"choices":[{"text":"a"}]}\n\n'
            yield 'data: {"choices":[],"usage":{"total_tokens":3}}\n\n'
            yield "data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    transport = httpx.ASGITransport(ProofMiddleware(app))
    return httpx.AsyncClient(transport=transport, base_url="http://app")


async def test_a_whole_answer_carries_the_first_choices_proof(client: httpx.AsyncClient) -> None:
    response = await client.post("/answer", json={"n": 2})
    assert response.json() == {"kv_transfer_params": {"other": 2}, "kv_compression": PROOFS[0]}
    assert int(response.headers["content-length"]) == len(response.content)


async def test_a_stream_carries_it_with_its_usage(client: httpx.AsyncClient) -> None:
    response = await client.post("/stream", json={"n": 1})
    events = [line for line in response.text.split("\n") if line]
    assert json.loads(events[1].removeprefix("data: ")) == {
        "choices": [],
        "usage": {"total_tokens": 3},
        "kv_compression": PROOFS[0],
    }
    assert "kv_compression" not in events[0]
    assert events[2] == "data: [DONE]"


async def test_without_proof_or_success_nothing_changes(client: httpx.AsyncClient) -> None:
    for body in ({"n": 0}, {"n": 1, "status": 400}):
        response = await client.post("/answer", json=body)
        assert "kv_compression" not in {*response.json()}
    response = await client.post("/stream", json={"n": 0})
    assert "kv_compression" not in response.text
