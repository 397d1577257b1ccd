"""Failovers between real servers: the old primary lives on as a replica, with its connections."""

import asyncio
import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from adakv_serve.router.ledger.redis_ledger import LedgerReader, LedgerWriter
from adakv_serve.router.ledger.store_client import refuse_unfit_store
from adakv_serve.router.lending.leases import Lease, Offer
from adakv_serve.router.lending.redis_leases import LendingLedger
from tests.router.ledger.test_subscription import KEYS, TTL_S, following
from tests.router.occupancies import occupancy
from tests.router.store_servers import Door, server_client, valkey


@pytest.fixture
def two(tmp_path: Path) -> Iterator[tuple[int, int]]:
    with valkey(tmp_path, "--save", "") as old, valkey(tmp_path, "--save", "") as new:
        yield old, new


def demote(port: int, to: int) -> None:
    with server_client(port) as client:
        client.replicaof("127.0.0.1", to)


async def reports_until_stored(writer: LedgerWriter, port: int, first: int) -> list[Exception]:
    """Report as a replica does, until the server has the report; return what failed before."""
    failures: list[Exception] = []
    reader = LedgerReader(f"redis://127.0.0.1:{port}", KEYS, TTL_S)
    async with asyncio.timeout(60):
        for sequence in itertools.count(first):
            try:
                await writer.publish(occupancy("r1", sequence=sequence, running=sequence))
            except redis.RedisError as error:
                failures.append(error)
            if reader.read().reports:
                break
    reader.close()
    return failures


@pytest.mark.parametrize("follows", [True, False], ids=["the old follows", "the old is cut off"])
async def test_reports_go_to_the_new_primary_after_one_that_failed(
    two: tuple[int, int], follows: bool
) -> None:
    old, new = two
    async with Door.to(old) as door, following(door.url) as view:
        writer = LedgerWriter(door.url, KEYS, TTL_S)
        await writer.publish(occupancy("r1", sequence=1, running=1))
        await view.until(lambda: view.running() == 1)
        door.target = new
        # Port 1 has no server: nothing that the new primary gets ever comes to the old one.
        demote(old, new if follows else 1)
        (failure,) = await reports_until_stored(writer, new, first=2)
        assert isinstance(failure, redis.ConnectionError)
        await writer.close()
        # Those who have listened to the old one hear the new one.
        direct = LedgerWriter(f"redis://127.0.0.1:{new}", KEYS, TTL_S)
        await view.until(lambda: (view.running() or 0) > 1)
        await direct.publish(occupancy("r1", sequence=1000, running=1000))
        await view.until(lambda: view.running() == 1000)
        await direct.close()


async def test_memory_is_lent_by_the_new_primary_after_calls_that_failed(
    two: tuple[int, int],
) -> None:
    old, new = two
    async with Door.to(old) as door:
        ledger = LendingLedger(door.url, KEYS)
        await ledger.offer(Offer("a", 10, 0))
        door.target = new
        demote(old, 1)
        lease = Lease("one", "a", "b", "blocks", 10)
        with pytest.raises(redis.ConnectionError):
            await ledger.take(lease)
        # As a lender does each second.
        await ledger.offer(Offer("a", 10, 0))
        assert await ledger.take(lease)
        direct = LendingLedger(f"redis://127.0.0.1:{new}", KEYS)
        assert (await direct.read()).lent("a") == 10
        await direct.close()
        await ledger.close()


async def test_a_reader_follows_too(two: tuple[int, int]) -> None:
    old, new = two
    async with Door.to(old) as door:
        reader = LedgerReader(door.url, KEYS, TTL_S)
        assert not (await asyncio.to_thread(reader.read)).reports
        writer = LedgerWriter(f"redis://127.0.0.1:{new}", KEYS, TTL_S)
        await writer.publish(occupancy("r1"))
        await writer.close()
        door.target = new
        demote(old, 1)
        with pytest.raises(redis.ConnectionError):
            await asyncio.to_thread(reader.read)
        assert len((await asyncio.to_thread(reader.read)).reports) == 1
        reader.close()


SENTINEL = """
sentinel monitor store 127.0.0.1 {primary} 1
sentinel auth-pass store secret
sentinel down-after-milliseconds store 60000
requirepass watch
"""


async def test_sentinel_leads_to_the_new_primary(tmp_path: Path) -> None:
    own = ("--save", "", "--requirepass", "secret", "--masterauth", "secret")
    with (
        valkey(tmp_path, *own, password="secret") as old,
        valkey(tmp_path, *own, password="secret") as new,
    ):
        with redis.Redis(port=new, password="secret") as client:
            client.replicaof("127.0.0.1", old)
        config = SENTINEL.format(primary=old)
        with valkey(tmp_path, "--sentinel", config=config, password="watch") as sentinel:
            hosts = f"127.0.0.1:1,127.0.0.1:{sentinel}"
            url = f"redis+sentinel://:secret@{hosts}/store?db=0&sentinel_password=watch"
            await _fails_over(url, sentinel, new)


def _begins_failover(sentinel: redis.Redis) -> bool:
    try:
        sentinel.execute_command("SENTINEL", "FAILOVER", "store")
    except redis.ResponseError:
        return False
    return True


async def _fails_over(url: str, sentinel: int, new: int) -> None:
    refuse_unfit_store(url)
    async with following(url) as view:
        writer = LedgerWriter(url, KEYS, TTL_S)
        await writer.publish(occupancy("r1", sequence=1, running=1))
        await view.until(lambda: view.running() == 1)
        with redis.Redis(port=sentinel, password="watch") as client:
            async with asyncio.timeout(60):
                # Sentinel has to find the replica, and to hear of it that it is in step.
                while not _begins_failover(client):
                    await asyncio.sleep(0.1)
        with redis.Redis(port=new, password="secret") as client:
            async with asyncio.timeout(60):
                for sequence in itertools.count(2):
                    report = occupancy("r1", sequence=sequence, running=sequence)
                    with contextlib.suppress(redis.RedisError):
                        await writer.publish(report)
                    is_primary = client.info("replication")["role"] == "master"
                    stored = client.get(KEYS.replica("r1"))
                    if is_primary and stored == report.model_dump_json().encode():
                        break
                    await asyncio.sleep(0.1)
        await view.until(lambda: (view.running() or 0) >= sequence)
        await writer.close()


def test_a_node_of_a_cluster_is_refused_by_name(tmp_path: Path) -> None:
    with (
        valkey(tmp_path, "--cluster-enabled", "yes") as port,
        pytest.raises(ValueError, match=r"store\.url leads to a node of a Redis Cluster"),
    ):
        refuse_unfit_store(f"redis://127.0.0.1:{port}")


def test_a_sentinel_is_refused_as_a_store(tmp_path: Path) -> None:
    with (
        valkey(tmp_path, "--sentinel", config="") as port,
        pytest.raises(ValueError, match=r"redis\+sentinel://HOST:PORT/SERVICE"),
    ):
        refuse_unfit_store(f"redis://127.0.0.1:{port}")


def test_a_single_server_is_taken_and_one_that_is_not_there_yet(store_url: str) -> None:
    refuse_unfit_store(store_url)
    refuse_unfit_store("redis://127.0.0.1:1")
    refuse_unfit_store("redis+sentinel://127.0.0.1:1/store")
