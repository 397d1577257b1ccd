"""Held caches that move between two engines: the next turn goes on from them there."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import pytest_asyncio

from adakv_worker.frontend.session_moves import (
    ProbableHolder,
    SessionAsk,
    SessionCore,
    probable_holder,
)
from adakv_worker.frontend.tenants import current_tenant
from adakv_worker.salts import tenant_salt
from adakv_worker.session_messages import Found, HeldCard
from tests.adakv_worker.async_engines import Client, Side
from tests.adakv_worker.conversation import SESSIONS
from tests.adakv_worker.engines import make_tiny_model, prompt

pytestmark = pytest.mark.asyncio(loop_scope="module")

OPTIONS: dict[str, Any] = {"max_tokens": 12}


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def sides(in_process: None, gqa_model: Path) -> AsyncIterator[tuple[Side, Side]]:
    sides = tuple(
        Side(gqa_model, sessions=SESSIONS, async_scheduling=False, enable_prefix_caching=True)
        for _ in range(2)
    )
    yield sides[0], sides[1]
    for side in sides:
        side.llm.shutdown()


async def asked(side: Side, ids: list[int], **options: Any) -> Client:
    client = Client(side, ids, {**OPTIONS, **options})
    await client.task
    return client


def ask_for(ids: list[int], **fields: Any) -> SessionAsk:
    ask = SessionAsk(b"", None, None)._replace(**fields)
    return ask._replace(token_bytes=b"".join(i.to_bytes(4, "little") for i in ids))


async def found(side: Side, ids: list[int], **fields: Any) -> Found | None:
    """Return the held cache that is found, once the engine has ended what came before."""
    # The workers hold a cache with the step after its request has ended.
    await asked(side, prompt(5, 999), max_tokens=1)
    return await SessionCore(side.core).find(ask_for(ids, **fields))


async def exported(side: Side, seed: int, path: Path) -> tuple[list[int], HeldCard]:
    """Return a conversation's second turn, and the card of its cache in the files at `path`."""
    first = await asked(side, prompt(300, seed))
    turn = [*first.ids, *first.tokens, *prompt(60, seed + 1)]
    one = await found(side, turn)
    assert one is not None
    card = await SessionCore(side.core).export(one.name, str(path))
    assert card is not None
    return turn, card


async def moved(here: Side, there: Side, ids: list[int], path: Path) -> Found:
    one = await found(here, ids)
    assert one is not None
    card = await SessionCore(here.core).export(one.name, str(path))
    assert card is not None
    assert await SessionCore(there.core).take_in(card, str(path))
    return one


def session(client: Client) -> dict[str, Any]:
    assert client.proof is not None
    record: dict[str, Any] = client.proof["session"]
    return record


async def test_the_next_turn_goes_on_where_its_cache_has_moved(
    sides: tuple[Side, Side], tmp_path: Path
) -> None:
    here, there = sides
    first = await asked(here, prompt(300, 1))
    turn = [*first.ids, *first.tokens, *prompt(60, 2)]
    one = await moved(here, there, turn, tmp_path / "state")
    assert one.tokens == 311
    assert one.nbytes > 0
    elsewhere, staying = await asked(there, turn), await asked(here, turn)
    assert session(elsewhere)["source"] == "replica"
    assert session(staying)["source"] == "pool"
    assert session(elsewhere)["resumed_tokens"] == session(staying)["resumed_tokens"] == 311
    assert elsewhere.tokens == staying.tokens
    assert elsewhere.logprobs == pytest.approx(staying.logprobs, abs=1e-4)
    # And the turn after that goes on from what this one has left.
    further = [*turn, *elsewhere.tokens, *prompt(60, 3)]
    after, stayed = await asked(there, further), await asked(here, further)
    assert session(after)["source"] == "pool"
    assert session(after)["turn"] == 3
    assert after.tokens == stayed.tokens
    assert after.logprobs == pytest.approx(stayed.logprobs, abs=1e-4)


async def test_a_cache_moves_from_engine_to_engine(
    sides: tuple[Side, Side], tmp_path: Path
) -> None:
    here, there = sides
    first = await asked(here, prompt(300, 4))
    turn = [*first.ids, *first.tokens, *prompt(60, 5)]
    await moved(here, there, turn, tmp_path / "state")
    # Nobody has begun with it there, and it comes back.
    await moved(there, here, turn, tmp_path / "other")
    again = await asked(here, turn)
    assert session(again)["resumed_tokens"] == 311


async def test_only_the_same_request_finds_it(sides: tuple[Side, Side]) -> None:
    here, _ = sides
    token = current_tenant.set("a")
    first = await asked(here, prompt(300, 6))
    current_tenant.reset(token)
    turn = [*first.ids, *first.tokens, *prompt(60, 7)]
    salt = tenant_salt("a", None)
    assert await found(here, turn, cache_salt=salt) is not None
    for other in (
        {}, {"cache_salt": tenant_salt("b", None)}, {"cache_salt": tenant_salt("a", "salt")},
        {"extra_args": {"adakv_budget_tokens": 100}, "cache_salt": salt},
    ):  # fmt: skip
        assert await found(here, turn, **other) is None
    other = [*first.ids[:200], *prompt(60, 8)]
    assert await found(here, other, cache_salt=salt) is None


async def test_a_damaged_cache_is_refused(sides: tuple[Side, Side], tmp_path: Path) -> None:
    here, there = sides
    path = tmp_path / "state"
    turn, card = await exported(here, 9, path)
    file = Path(f"{path}.0")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert not await SessionCore(there.core).take_in(card, str(path))
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    other = msgspec.structs.replace(card, scope="another")
    assert not await SessionCore(there.core).take_in(other, str(path))
    assert await found(there, turn) is None
    assert await SessionCore(here.core).export("nothing", str(path)) is None
    assert session(await asked(there, turn))["skipped"] == "no_match"


async def test_a_cache_arrives_whole_even_if_nobody_waits_for_it(
    sides: tuple[Side, Side], tmp_path: Path
) -> None:
    here, there = sides
    path = tmp_path / "state"
    turn, card = await exported(here, 19, path)
    coming = asyncio.create_task(SessionCore(there.core).take_in(card, str(path)))
    await asyncio.sleep(0)
    coming.cancel()
    await asyncio.wait([coming])
    async with asyncio.timeout(60):
        while await found(there, turn) is None:
            await asyncio.sleep(0.01)
    client = await asked(there, turn)
    assert session(client)["source"] == "replica"


async def test_all_held_caches_are_listed_the_newest_first(
    sides: tuple[Side, Side],
) -> None:
    here, _ = sides
    one, two = await asked(here, prompt(300, 11)), await asked(here, prompt(250, 12))
    await found(here, [1, 2])
    newest, before, *_ = await SessionCore(here.core).held()
    assert (newest.tokens, before.tokens) == (261, 311)
    assert one.ids != two.ids


async def test_each_rank_moves_its_part(in_process: None, tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model", heads=8, kv_heads=4)
    side = Side(
        model, sessions=SESSIONS, tensor_parallel_size=2, distributed_executor_backend="mp",
        async_scheduling=False, enable_prefix_caching=True,
    )  # fmt: skip
    try:
        first = await asked(side, prompt(300, 13))
        turn = [*first.ids, *first.tokens, *prompt(60, 14)]
        one = await found(side, turn)
        assert one is not None
        card = await SessionCore(side.core).export(one.name, str(tmp_path / "state"))
        assert card is not None
        assert {file.name for file in tmp_path.glob("state.*")} == {"state.0", "state.1"}
        staying = await asked(side, turn)
        await side.llm.reset_prefix_cache()
        assert await SessionCore(side.core).take_in(card, str(tmp_path / "state"))
        arrived = await asked(side, turn)
        assert session(arrived)["source"] == "replica"
        assert arrived.tokens == staying.tokens
        assert arrived.logprobs == pytest.approx(staying.logprobs, abs=1e-4)
    finally:
        side.llm.shutdown()


async def test_a_request_is_prepared_before_its_engine_gets_it(
    sides: tuple[Side, Side], tmp_path: Path
) -> None:
    here, there = sides
    first = await asked(here, prompt(300, 15))
    turn = [*first.ids, *first.tokens, *prompt(60, 16)]
    await found(here, turn)
    asks: list[tuple[str, SessionAsk]] = []

    async def fetch(holder: str, ask: SessionAsk) -> None:
        asks.append((holder, ask))
        one = await SessionCore(here.core).find(ask)
        assert one is not None
        card = await SessionCore(here.core).export(one.name, str(tmp_path / "state"))
        assert card is not None
        await SessionCore(there.core).take_in(card, str(tmp_path / "state"))

    SessionCore(there.core).fetch_by(fetch)
    token = probable_holder.set(ProbableHolder("holder"))
    try:
        await asked(there, prompt(300, 19), skip_reading_prefix_cache=True)
        # As vLLM does with each prompt of a completion and each beam.
        client, _ = await asyncio.gather(asked(there, turn), asked(there, prompt(300, 20)))
        probable_holder.reset(token)
        await asked(there, turn)
    finally:
        there.core.prepare = None
    assert session(client)["source"] == "replica"
    assert [(holder, ask.tokens) for holder, ask in asks] == [("holder", len(turn))]


async def test_a_client_that_leaves_while_its_request_is_prepared_leaves_nothing(
    sides: tuple[Side, Side],
) -> None:
    _, there = sides
    begun = asyncio.Event()

    async def wait(request: Any) -> None:
        begun.set()
        await asyncio.Event().wait()

    there.core.prepare = wait
    try:
        client = Client(there, prompt(300, 17), OPTIONS)
        await begun.wait()
        (waiting,) = there.llm.sent.unseen()
        assert there.llm.sent.prefill_tokens([waiting]) == [300]
        client.task.cancel()
        await asyncio.wait([client.task])
    finally:
        there.core.prepare = None
    assert not there.llm.output_processor.request_states
    assert not there.llm.sent.unseen()
    assert (await asked(there, prompt(300, 18))).finish_reason == "length"
