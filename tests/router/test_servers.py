"""Every kind of server keeps the ledger and the leases, with TLS and a password too."""

import asyncio

from router.ledger.redis_ledger import LedgerKeys, LedgerReader, LedgerWriter
from router.ledger.subscription import LedgerSubscription
from router.lending.leases import Lease, Offer
from router.lending.redis_leases import LendingLedger
from router.local_view import LocalView
from tests.router.occupancies import occupancy

KEYS = LedgerKeys("adakv", "app")


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
