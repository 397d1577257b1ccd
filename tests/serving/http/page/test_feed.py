"""The feed: what viewers get, and that they are few and cost little."""

import asyncio
import random
import tracemalloc
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from adakv_serve.router.chooser import Chooser
from adakv_serve.router.decision_log import DecisionLog
from adakv_serve.router.footprint import Footprint
from adakv_serve.router.local_view import LocalView
from adakv_serve.serving.http.page.feed import Feed, FeedFull, FeedSource, Scale
from tests.router.occupancies import occupancy
from tests.serving.http.page.viewers import Source, parsed

# A few KB a second.
MOST_BYTES = 8_000
FACTS = {"application": "llm"}


async def next_of(events: AsyncGenerator[bytes, None]) -> dict[str, Any]:
    async with asyncio.timeout(60):
        return parsed(await anext(events))[1]


async def test_a_viewer_gets_the_facts_then_all_rows_then_changed_ones() -> None:
    source = Source(3)
    feed = Feed(FeedSource(source.read), FACTS, 4)
    feed.tick()
    with feed.viewing() as events:
        facts, state = await next_of(events), await next_of(events)
        assert (facts["application"], len(facts["history"])) == ("llm", 1)
        assert (state["whole"], len(state["rows"])) == (True, 3)
        source.change(1, running=9, sequence=2)
        feed.tick()
        state = await next_of(events)
        rows = [dict(zip(facts["fields"], row, strict=True)) for row in state["rows"]]
        assert [(row["id"], row["running"]) for row in rows] == [("r0000001", 9)]
        fleet = dict(zip(facts["sample_fields"], state["fleet"], strict=True))
        assert (fleet["replicas"], fleet["running"]) == (3, 13)


async def test_who_has_missed_a_state_gets_all_rows() -> None:
    source = Source(2)
    feed = Feed(FeedSource(source.read), FACTS, 4)
    with feed.viewing() as events:
        await next_of(events), await next_of(events)
        for _ in range(3):
            feed.tick()
        state = await next_of(events)
        assert (state["whole"], len(state["rows"])) == (True, 2)
        feed.tick()
        assert (await next_of(events))["rows"] == []


async def test_a_state_of_64_replicas_has_a_few_kilobytes_a_second() -> None:
    source, rng = Source(64), random.Random(0)
    feed = Feed(FeedSource(source.read), FACTS, 4)
    feed.tick()
    sizes = []
    with feed.viewing() as events:
        await anext(events), await anext(events)
        for sequence in range(20):
            for number in range(64):
                free = rng.randrange(10_000)
                source.change(
                    number, blocks_total=10_000, blocks_free=free, running=rng.randrange(200),
                    blocks_compressed=10_000 - free, sequence=sequence, preemptions=sequence,
                    decode_tokens_per_s=rng.random() * 5000, blocks_held=rng.randrange(free + 1),
                )  # fmt: skip
            feed.tick()
            sizes.append(len(await anext(events)))
    assert max(sizes) < MOST_BYTES * feed.gap_s


async def test_a_larger_fleet_sends_less_often() -> None:
    source = Source(256)
    feed = Feed(FeedSource(source.read), FACTS, 4)
    feed.tick()
    assert feed.gap_s == 4.0
    with feed.viewing() as events:
        await anext(events)
        assert len(await anext(events)) < MOST_BYTES * feed.gap_s


async def test_viewers_cost_no_further_reads() -> None:
    source = Source(2)
    feed = Feed(FeedSource(source.read), FACTS, 4)
    with feed.viewing() as one, feed.viewing() as other:
        for events in (one, other):
            await next_of(events), await next_of(events)
        feed.tick()
        assert await next_of(one) == await next_of(other)
    assert source.reads == 1


async def test_a_viewer_that_does_not_read_holds_nothing() -> None:
    source = Source(64)
    feed = Feed(FeedSource(source.read), FACTS, 4)
    with feed.viewing() as slow, feed.viewing() as quick:
        for events in (slow, quick):
            await anext(events), await anext(events)
        await _run(feed, source, quick, 400)
        tracemalloc.start()
        try:
            before, _ = tracemalloc.get_traced_memory()
            await _run(feed, source, quick, 400)
            after, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        # Less than what a queue of its states would hold by far: they have 400 times 5 KB.
        assert after - before < 400_000


async def _run(feed: Feed, source: Source, quick: AsyncGenerator[bytes, None], ticks: int) -> None:
    for _ in range(ticks):
        source.change(0, sequence=source.reports[0].occupancy.sequence + 1, running=source.reads)
        feed.tick()
        await anext(quick)


async def test_there_are_no_more_viewers_than_allowed() -> None:
    feed = Feed(FeedSource(list), FACTS, 2)
    with feed.viewing(), feed.viewing():
        assert feed.viewers == 2
        with pytest.raises(FeedFull), feed.viewing():
            pass
    assert feed.viewers == 0
    with feed.viewing():
        pass


async def test_the_last_minutes_are_kept_and_no_more() -> None:
    feed = Feed(FeedSource(Source(1).read), FACTS, 2)
    for _ in range(400):
        feed.tick()
    with feed.viewing() as events:
        assert len((await next_of(events))["history"]) == 300


async def test_decisions_come_once_with_their_counts() -> None:
    log, view = DecisionLog(), LocalView()
    view.accept(occupancy("r1"), 0.0)
    chooser, footprint = Chooser(view), Footprint(3, 2, 700, 50)
    clock = 10.0

    def decide() -> None:
        decision = chooser.choose("a", ["r1"], footprint, 0.5)
        assert decision is not None
        log.count(decision.reason)
        log.note(decision, footprint, clock)

    feed = Feed(
        FeedSource(list, log, lambda: Scale(3, 1, 4)), FACTS, 2, lambda: clock, lambda: 1000 + clock
    )
    decide()
    feed.tick()
    with feed.viewing() as events:
        await next_of(events)
        state = await next_of(events)
        (first,) = state["decisions"]
        assert (first["replica_id"], first["reason"]) == ("r1", "least_cost")
        assert (first["prompt_tokens"], first["candidates"], first["at_s"]) == (700, 1, 1010.0)
        assert state["scale"] == {"target": 3, "least": 1, "most": 4}
        decide()
        feed.tick()
        # Decided before the viewer takes the state, it belongs to the next one.
        decide()
        state = await next_of(events)
        assert [one["number"] for one in state["decisions"]] == [2]
        feed.tick()
        state = await next_of(events)
        assert [one["number"] for one in state["decisions"]] == [3]
        assert state["reasons"] == {"least_cost": 3}
        feed.tick()
        assert (await next_of(events))["decisions"] == []


def test_the_log_of_decisions_stays_small() -> None:
    log, view = DecisionLog(), LocalView()
    view.accept(occupancy("r1"), 0.0)
    footprint = Footprint(3, 2, 700, 50)
    decision = Chooser(view).choose("a", ["r1"], footprint, 0.5)
    assert decision is not None
    for _ in range(100):
        log.note(decision, footprint, 0.0)
    assert [one.number for one in log.last()] == list(range(81, 101))


async def test_it_ticks_by_itself() -> None:
    source = Source(1)
    feed = Feed(FeedSource(source.read), FACTS, 2)
    task = asyncio.create_task(feed.run())
    with feed.viewing() as events:
        await next_of(events)
        await next_of(events)
        await next_of(events)
    task.cancel()
    assert source.reads >= 1
