"""The ledger's writer and reader against a real server."""

import asyncio

import redis
import uvloop
from hypothesis import given
from hypothesis import strategies as st

from adakv_serve.router.ledger.occupancy import REPORT_TTL_S
from adakv_serve.router.ledger.redis_ledger import (
    LedgerKeys,
    LedgerReader,
    LedgerWriter,
    report_gap_s,
)
from tests.router.occupancies import occupancy

KEYS = LedgerKeys("test", "app")
# Long against the time that a test takes.
TTL_S = 600


async def _publish(store_url: str, *replica_ids: str, keys: LedgerKeys = KEYS) -> None:
    writer = LedgerWriter(store_url, keys, TTL_S)
    for replica_id in replica_ids:
        await writer.publish(occupancy(replica_id))
    await writer.close()


async def test_every_replica_is_read_back_with_its_age(store_url: str, client: redis.Redis) -> None:
    await _publish(store_url, "b", "a")
    client.pexpire(KEYS.replica("b"), 500_000)
    view = LedgerReader(store_url, KEYS, TTL_S).read()
    assert [report.occupancy.replica_id for report in view.reports] == ["a", "b"]
    assert 0 <= view.reports[0].age_s < 100 <= view.reports[1].age_s < 600


async def test_an_expired_report_is_gone_and_its_id_forgotten(
    store_url: str, client: redis.Redis
) -> None:
    await _publish(store_url, "a")
    client.pexpire(KEYS.replica("a"), 0)
    assert LedgerReader(store_url, KEYS, TTL_S).read().reports == []
    assert client.zrange(KEYS.members, 0, -1) == []


async def test_reports_expire_by_themselves(store_url: str, client: redis.Redis) -> None:
    await _publish(store_url, "a")
    assert 0 < client.pttl(KEYS.replica("a")) <= 1000 * TTL_S


async def test_a_withdrawn_replica_is_gone_at_once(store_url: str, client: redis.Redis) -> None:
    await _publish(store_url, "a", "b")
    writer = LedgerWriter(store_url, KEYS, TTL_S)
    await writer.withdraw("a")
    await writer.close()
    view = LedgerReader(store_url, KEYS, TTL_S).read()
    assert [report.occupancy.replica_id for report in view.reports] == ["b"]


async def test_applications_and_prefixes_do_not_see_each_other(
    store_url: str, client: redis.Redis
) -> None:
    await _publish(store_url, "a", keys=LedgerKeys("test", "other"))
    await _publish(store_url, "b", keys=LedgerKeys("elsewhere", "app"))
    assert LedgerReader(store_url, KEYS, TTL_S).read().reports == []


async def test_malformed_reports_are_dropped_and_counted(
    store_url: str, client: redis.Redis
) -> None:
    await _publish(store_url, "good", "old", "broken")
    client.set(KEYS.replica("broken"), b"{", px=1000 * TTL_S)
    newer = occupancy("old").model_copy(update={"schema_major": 9})
    client.set(KEYS.replica("old"), newer.model_dump_json(), px=1000 * TTL_S)
    view = LedgerReader(store_url, KEYS, TTL_S).read()
    assert [report.occupancy.replica_id for report in view.reports] == ["good"]
    assert view.dropped == 2


async def test_ids_of_expired_reports_go_with_the_next_report_and_all_keys_expire(
    store_url: str, client: redis.Redis
) -> None:
    await _publish(store_url, "a", "b")
    # Nobody reads: a fleet whose requests are routed otherwise has no reader.
    client.zadd(KEYS.members, {"a": 1})
    await _publish(store_url, "c")
    assert client.zrange(KEYS.members, 0, -1) == [b"b", b"c"]
    assert all(0 < client.pttl(key) <= 1000 * TTL_S for key in client.scan_iter())


async def test_a_closed_writer_can_go_on(store_url: str, client: redis.Redis) -> None:
    writer = LedgerWriter(store_url, KEYS, TTL_S)
    for replica_id in ("a", "b"):
        await writer.publish(occupancy(replica_id))
        await writer.close()
    assert len(LedgerReader(store_url, KEYS, TTL_S).read().reports) == 2


def test_a_connection_that_the_store_has_closed_is_replaced(
    store_url: str, client: redis.Redis
) -> None:
    async def report_after_each_end() -> int:
        writer, lost = LedgerWriter(store_url, KEYS), 0
        for _ in range(10):
            try:
                await writer.publish(occupancy("r1"))
            except redis.RedisError:
                lost += 1
            client.client_kill_filter(_type="normal", skipme=True)
            # The loop sees the end of the connection, as of one that has been idle for a while.
            await asyncio.sleep(0.01)
        await writer.close()
        return lost

    # Ray runs on uvloop, whose transports raise other errors.
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(report_after_each_end()) == 0


async def test_reports_are_published_too(store_url: str, client: redis.Redis) -> None:
    listener = client.pubsub(ignore_subscribe_messages=True)
    listener.subscribe(KEYS.channel)
    listener.get_message(timeout=60)
    await _publish(store_url, "a")
    message = listener.get_message(timeout=60)
    assert message is not None
    assert b'"replica_id":"a"' in message["data"]


async def test_a_writer_learns_the_size_of_its_fleet(store_url: str, client: redis.Redis) -> None:
    await _publish(store_url, "a", "b")
    writer = LedgerWriter(store_url, KEYS, TTL_S)
    assert await writer.publish(occupancy("c")) == 3
    assert await writer.publish(occupancy("a")) == 3
    await writer.close()


@given(st.integers(1, 10_000))
def test_a_large_fleet_reports_less_often_and_no_report_is_lost(replicas: int) -> None:
    gap_s = report_gap_s(replicas)
    assert 0.1 <= report_gap_s(max(1, replicas // 2)) <= gap_s <= REPORT_TTL_S / 2
    if replicas <= 1000:
        # Ten of each replica in a small fleet.
        assert replicas / gap_s <= max(1000, 10 * replicas) + 1e-6
        assert replicas <= 100 or replicas / gap_s <= 1000 + 1e-6
