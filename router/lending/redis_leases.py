"""The ledger of lent memory in Redis. Every operation is one script, and so is atomic.

Keys, under `{prefix}:{application}:lending:`:
    offers, leases            hashes: offers by lender and leases by lease id, as JSON
    offer_ends, lease_ends    sorted sets: their expiry times, in ms of Redis' own clock
    lent                      hash: what is lent, by resource and lender
    room_blocks, room_bytes   sorted sets: what can still be leased of each lender

Each script first removes expired entries. So nothing depends on replicas' clocks, and a replica
that dies needs no clean-up. A jump of Redis' clock only makes leases expire earlier or later. What
a script does grows with the logarithm of the number of lenders, except `read`, and `best` while
most lenders have caches of another kind, as in a rolling update.

If Redis has evicted one of the keys, the others make no sense: a lease without its end would last
for ever. Then a script removes all of them, as if the store had been flushed. Lenders offer again
within a second, and borrowers take their leases again.
"""

import contextlib
import json
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

from adakv_serve.router.ledger.redis_ledger import LedgerKeys
from adakv_serve.router.ledger.store_client import SOCKET_TIMEOUT_S, connect
from adakv_serve.router.lending import scripts
from adakv_serve.router.lending.leases import RESOURCES, Lease, Lending, Offer, Room

OFFER_TTL_S = 5.0
LEASE_TTL_S = 10.0
# A plan moves a few requests at once, and others take from the same lenders.
_BEST_LENDERS = 16


class LendingKeys(NamedTuple):
    """The keys of one application's lending, in the order in which the scripts take them."""

    offers: str
    leases: str
    offer_ends: str
    lease_ends: str
    lent: str
    room_blocks: str
    room_bytes: str

    @classmethod
    def of(cls, keys: LedgerKeys) -> "LendingKeys":
        return cls(*(f"{keys.prefix}:{keys.application}:lending:{name}" for name in cls._fields))


class LendingLedger:
    """Access of lenders, borrowers and inspectors, for one event loop.

    Every method raises `redis.RedisError` if the store is unreachable or takes longer than
    `timeout_s`. The store may have done the operation all the same: a repeated `take` with the same
    id finds the lease, and without one it expires.
    """

    def __init__(self, url: str, keys: LedgerKeys, timeout_s: float = SOCKET_TIMEOUT_S) -> None:
        self._keys = LendingKeys.of(keys)
        self._client = connect(url, timeout_s)
        self._scripts = {one: self._client.register_script(one) for one in scripts.ALL}

    async def offer(self, offer: Offer, ttl_s: float = OFFER_TTL_S) -> None:
        """Add or change a lender's offer for `ttl_s`. Repeat the call before they are over.

        An offer below what is lent ends no lease, but allows no new one.
        """
        fields = offer._asdict()
        lender = fields.pop("lender")
        await self._run(scripts.OFFER, lender, json.dumps(fields), _ms(ttl_s))

    async def withdraw(self, lender: str) -> None:
        """Remove a lender's offer. Its leases cannot be renewed, and expire."""
        await self._run(scripts.WITHDRAW, lender)

    async def take(self, lease: Lease, ttl_s: float = LEASE_TTL_S) -> bool:
        """Add a lease if enough of the lender's offer is left. The borrower chooses its id.

        Returns whether the lease exists, also if it existed before.

        Raises:
            ValueError: the amount is not positive, or the borrower is the lender.
        """
        if lease.amount <= 0 or lease.lender == lease.borrower:
            raise ValueError(f"not a lease, which needs an amount and two replicas: {lease}")
        fields = lease._asdict()
        lease_id = fields.pop("lease_id")
        return await self._run(scripts.TAKE, lease_id, json.dumps(fields), _ms(ttl_s)) == 1

    async def renew(self, lease_id: str, ttl_s: float = LEASE_TTL_S) -> bool:
        """Make a lease last `ttl_s` from now. Return False if it or its offer has ended."""
        return await self._run(scripts.RENEW, lease_id, _ms(ttl_s)) == 1

    async def give_back(self, lease_id: str) -> bool:
        """End a lease. Return False if it had ended before."""
        return await self._run(scripts.GIVE_BACK, lease_id) == 1

    async def best(self, cache_kind: str = "", count: int = _BEST_LENDERS) -> list[Room]:
        """Return the lenders with the most room: `count` by blocks, and as many by host memory.

        The one with the most blocks comes first.

        Args:
            cache_kind: name of the kind of caches that they must be able to read.
        """
        found = await self._run(scripts.BEST, count, cache_kind)
        rooms = [
            Room(_text(name), int(float(blocks)), int(float(size)))
            for name, blocks, size in cast(list[tuple[bytes, bytes, bytes]], found)
        ]
        return sorted(rooms, key=lambda room: (-room.blocks, -room.host_bytes, room.lender))

    async def read(self) -> Lending:
        """Return all offers and leases, which takes long in a large fleet.

        Fields and resources that only a newer version knows, and unreadable entries, are left out.
        """
        offers, leases = cast(list[list[bytes]], await self._run(scripts.READ))
        return Lending(
            sorted(filter(None, (_offer(*item) for item in _items(offers)))),
            sorted(filter(None, (_lease(*item) for item in _items(leases)))),
        )

    async def close(self) -> None:
        await self._client.aclose()

    async def _run(self, script: str, *arguments: str | int) -> object:
        return await self._scripts[script](keys=list(self._keys), args=list(arguments))


def _ms(seconds: float) -> int:
    return round(seconds * 1000)


def _text(name: bytes) -> str:
    return name.decode(errors="replace")


def _items(pairs: list[bytes]) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, value in zip(pairs[::2], pairs[1::2], strict=True):
        with contextlib.suppress(ValueError):
            fields = json.loads(value)
            if isinstance(fields, dict):
                yield _text(name), fields


def _offer(name: str, fields: dict[str, Any]) -> Offer | None:
    blocks, host_bytes = fields.get("blocks", 0), fields.get("host_bytes", 0)
    kind = fields.get("cache_kind", "")
    if isinstance(blocks, int) and isinstance(host_bytes, int) and isinstance(kind, str):
        return Offer(name, blocks, host_bytes, kind)
    return None


def _lease(name: str, fields: dict[str, Any]) -> Lease | None:
    lender, borrower, amount = fields.get("lender"), fields.get("borrower"), fields.get("amount")
    resource = next((one for one in RESOURCES if one == fields.get("resource")), None)
    if not isinstance(lender, str) or not isinstance(borrower, str):
        return None
    if resource is None or not isinstance(amount, int):
        return None
    return Lease(name, lender, borrower, resource, amount)
