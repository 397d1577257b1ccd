"""A front door that is drained: what runs goes on, and what comes is refused."""

import asyncio
import json

import pytest

from tests.serving.http.scripted_backend import (
    SSE_START,
    WHOLE,
    Clock,
    ScriptedBackend,
    chunk,
    door_and_client,
    error_of,
)


async def test_a_drained_door_refuses_with_retry_after_until_its_time_is_over() -> None:
    clock = Clock()
    door, client = door_and_client(ScriptedBackend([WHOLE]), clock, retry_after_s=3)
    door.draining.refuse_for(10)
    for path in ("/v1/completions", "/v1/models", "/health"):
        response = await client.get(path)
        assert response.status_code == 503
        assert response.headers["retry-after"] == "3"
        assert error_of(response)["type"] == "ServiceUnavailable"
    clock.now += 11
    assert (await client.get("/health")).status_code == 200
    assert (await client.post("/v1/completions")).status_code == 200


async def test_a_request_that_runs_is_told_of_and_ends_whole() -> None:
    clock, gate = Clock(), asyncio.Event()
    backend = ScriptedBackend([[SSE_START, chunk(b"data: 1\n\n")], gate, [chunk(b"", False)]])
    door, client = door_and_client(backend, clock)
    headers = {"x-request-id": "mine"}
    answer = asyncio.create_task(client.post("/v1/completions", headers=headers))
    async with asyncio.timeout(60):
        while not backend.calls:
            await asyncio.sleep(0)
        door.draining.refuse_for(10)
        clock.now += 5
        assert door.draining.running() == [("mine", 5.0)]
        gate.set()
        assert (await answer).text == "data: 1\n\n"
    assert door.draining.running() == []


@pytest.mark.parametrize("has_begun", [True, False])
async def test_a_cut_ends_what_runs_with_an_error(has_begun: bool) -> None:
    begin = [[SSE_START, chunk(b"data: 1\n\n")]] if has_begun else []
    gate = asyncio.Event()
    backend = ScriptedBackend([*begin, asyncio.Event()], [gate, WHOLE])
    door, client = door_and_client(backend)
    answer = asyncio.create_task(client.post("/v1/completions"))
    async with asyncio.timeout(60):
        while not backend.calls:
            await asyncio.sleep(0)
        door.draining.cut_all()
        response = await answer
    assert backend.closed.is_set()
    if has_begun:
        first, last = response.text.strip().split("\n\n")
        assert first == "data: 1"
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == 503
    else:
        assert error_of(response)["code"] == 503
    # A later one is not concerned.
    later = asyncio.create_task(client.post("/v1/completions"))
    async with asyncio.timeout(60):
        while len(backend.calls) < 2:
            await asyncio.sleep(0)
        for _ in range(10):
            await asyncio.sleep(0)
        gate.set()
        assert (await later).status_code == 200
