"""Requests that move between two engines, as the client of the first sees them."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from adakv_worker.frontend.answer_tokens import AnswerTokens, current_answer_tokens
from adakv_worker.frontend.moving import Departure
from adakv_worker.messages import StateRefused
from tests.adakv_worker.async_engines import Client, Side, idle, inside, undisturbed
from tests.adakv_worker.engines import make_tiny_model

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def sides(in_process: None, gqa_model: Path) -> AsyncIterator[tuple[Side, Side]]:
    sides = Side(gqa_model), Side(gqa_model)
    yield sides
    for side in sides:
        side.llm.shutdown()


async def move(here: Side, there: Side, name: str, path: str) -> asyncio.Task[None] | None:
    """Moves a request; the task hands its outputs on until its end."""
    departure = await here.core.leave(name, path)
    if departure is None:
        return None
    return asyncio.create_task(follow(here, there, departure, path))


async def follow(here: Side, there: Side, departure: Departure, path: str) -> None:
    outputs = there.core.take_in(departure, path)
    async with contextlib.aclosing(outputs):
        async for batch in outputs:
            if not here.core.deliver(departure.request.request_id, batch):
                return


async def test_engines_that_can_exchange_requests_name_the_same_kind_of_caches(
    sides: tuple[Side, Side],
) -> None:
    here, there = sides
    assert await here.core.cache_kind() == await there.core.cache_kind()


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 5}], ids=["greedy", "seeded"])
async def test_its_client_notices_nothing(
    sides: tuple[Side, Side], tmp_path: Path, options: dict[str, Any]
) -> None:
    here, there = sides
    client, other = here.ask(1, **options), there.ask(2, max_tokens=200)
    await client.has(15)
    following = await move(here, there, inside(here, client), str(tmp_path / "state"))
    assert following is not None
    assert (here.core.away, there.core.guests) in ((1, 0), (1, 1))
    await client.task
    await following
    expected = await undisturbed(here, client, **options)
    assert client.tokens == expected.tokens
    assert client.logprobs == pytest.approx(expected.logprobs, abs=1e-4)
    assert (client.finish_reason, client.proof) == (expected.finish_reason, expected.proof)
    await other.task
    assert await idle(here)
    assert await idle(there)


async def test_whenever_it_is_asked_to_leave_no_token_is_lost_or_doubled(
    sides: tuple[Side, Side], tmp_path: Path
) -> None:
    here, there = sides
    clients = [here.ask(text, max_tokens=12) for text in range(20, 28)]
    followings = []
    for number, client in enumerate(clients):
        await client.has(1 + number * 10 // 7)
        if client.finish_reason is None:
            path = str(tmp_path / f"state-{number}")
            followings.append(await move(here, there, inside(here, client), path))
    await asyncio.gather(*(client.task for client in clients))
    await asyncio.gather(*(following for following in followings if following is not None))
    assert any(followings)
    for client in clients:
        assert client.tokens == (await undisturbed(here, client, max_tokens=12)).tokens
    assert await idle(here)
    assert await idle(there)


async def test_when_the_other_engine_is_lost_it_is_computed_anew(
    sides: tuple[Side, Side], tmp_path: Path
) -> None:
    here, there = sides
    client = here.ask(3)
    await client.has(10)
    name = inside(here, client)
    following = await move(here, there, name, str(tmp_path / "state"))
    assert following is not None
    await client.has(25)
    following.cancel()
    await asyncio.wait([following])
    sent = len(client.tokens)
    await here.core.come_back(name)
    await client.task
    assert len(client.tokens) == 60
    # As a new request with what was sent as its prompt.
    fresh = Client(here, [*client.ids, *client.tokens[:sent]], {"max_tokens": 60 - sent})
    await fresh.task
    assert client.tokens[sent:] == fresh.tokens
    assert client.proof is not None
    assert client.proof["original_tokens"] == 300 + sent
    assert await idle(here)
    assert await idle(there)


async def test_an_answer_that_another_engine_has_begun_moves_too(
    sides: tuple[Side, Side], tmp_path: Path
) -> None:
    here, there = sides
    options: dict[str, Any] = {"logprobs": None, "max_tokens": 400}
    whole = here.ask(12, **options)
    await whole.task
    begun = whole.tokens[:10]

    def ask() -> Client:
        token = current_answer_tokens.set(AnswerTokens(begun))
        client = here.ask(12, **options)
        current_answer_tokens.reset(token)
        return client

    # One after the other: of two that share their prompt's blocks one stays whole, and cannot move.
    staying = ask()
    await staying.task
    moving = ask()
    await moving.has(20)
    following = await move(here, there, inside(here, moving), str(tmp_path / "state"))
    assert following is not None
    await asyncio.gather(moving.task, following)
    assert moving.tokens[:10] == begun
    assert (len(moving.tokens), moving.tokens) == (400, staying.tokens)
    assert await idle(here)
    assert await idle(there)


async def test_a_client_that_leaves_ends_it_where_it_is(
    sides: tuple[Side, Side], tmp_path: Path
) -> None:
    here, there = sides
    client = here.ask(4, max_tokens=1000)
    await client.has(10)
    name = inside(here, client)
    following = await move(here, there, name, str(tmp_path / "state"))
    assert following is not None
    here.core.on_end(name, following.cancel)
    await client.has(20)
    client.task.cancel()
    await asyncio.wait([client.task, following])
    assert await idle(here)
    assert await idle(there)


async def test_a_damaged_cache_is_refused_and_computed_anew(
    sides: tuple[Side, Side], tmp_path: Path
) -> None:
    here, there = sides
    client = here.ask(5)
    await client.has(10)
    name, path = inside(here, client), tmp_path / "state"
    departure = await here.core.leave(name, str(path))
    assert departure is not None
    file = Path(f"{path}.0")
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(StateRefused, match="cannot be read"):
        await follow(here, there, departure, str(path))
    await here.core.come_back(name)
    await client.task
    assert len(client.tokens) == 60
    assert client.tokens[:10] == (await undisturbed(here, client)).tokens[:10]
    assert await idle(there)


async def test_a_cache_that_cannot_be_written_leaves_it_where_it_is(
    sides: tuple[Side, Side],
) -> None:
    here, _ = sides
    client = here.ask(6)
    await client.has(10)
    with pytest.raises(Exception, match="collective_rpc"):
        await here.core.leave(inside(here, client), "/nowhere/state")
    await client.task
    assert client.tokens == (await undisturbed(here, client)).tokens


async def test_only_what_is_compressed_and_can_move_is_offered(
    sides: tuple[Side, Side], tmp_path: Path
) -> None:
    here, _ = sides
    short, long = here.ask(7, length=20), here.ask(8)
    prompted = here.ask(9, prompt_logprobs=1)
    await asyncio.gather(short.has(10), long.has(10), prompted.has(10))
    (movable,) = here.core.movable()
    assert movable.request_id == inside(here, long)
    assert movable.tokens + movable.tokens_left == 360
    assert movable.proof.original_tokens == 300
    for client in (short, prompted):
        assert await here.core.leave(inside(here, client), str(tmp_path / "state")) is None
    assert await here.core.leave("nobody", str(tmp_path / "state")) is None
    await asyncio.gather(short.task, long.task, prompted.task)
    assert here.core.movable() == []


@pytest.mark.slow
@pytest.mark.long
async def test_each_rank_moves_its_part(in_process: None, tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model", heads=8, kv_heads=4)
    side = Side(model, tensor_parallel_size=2, distributed_executor_backend="mp")
    try:
        client = side.ask(1)
        await client.has(15)
        following = await move(side, side, inside(side, client), str(tmp_path / "state"))
        assert following is not None
        assert {file.name for file in tmp_path.glob("state.*")} == {"state.0", "state.1"}
        await client.task
        await following
        assert client.tokens == (await undisturbed(side, client)).tokens
        assert await idle(side)
    finally:
        side.llm.shutdown()
