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
from adakv_serve.router.lending.leases import RESOURCES, Lease, Lending, Offer, Room

OFFER_TTL_S = 5.0
LEASE_TTL_S = 10.0
# A plan moves a few requests at once, and others take from the same lenders.
_BEST_LENDERS = 16

_BEGIN = """
local offers, leases, offer_ends, lease_ends = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local lent, rooms = KEYS[5], {blocks = KEYS[6], host_bytes = KEYS[7]}
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

-- Brings a lender's room up to date.
local function rank(lender)
    local text = redis.call('HGET', offers, lender)
    local offer = text and cjson.decode(text)
    for resource, room in pairs(rooms) do
        if offer then
            local sum = tonumber(redis.call('HGET', lent, resource .. ':' .. lender) or '0')
            redis.call('ZADD', room, math.max(0, (offer[resource] or 0) - sum), lender)
        else
            redis.call('ZREM', room, lender)
        end
    end
end

local function remove_offer(lender)
    redis.call('HDEL', offers, lender)
    redis.call('ZREM', offer_ends, lender)
    rank(lender)
end

local function add_lent(lease, sign)
    local name = lease.resource .. ':' .. lease.lender
    local change = string.format('%.0f', sign * lease.amount)
    if redis.call('HINCRBY', lent, name, change) <= 0 then redis.call('HDEL', lent, name) end
    rank(lease.lender)
end

local function remove_lease(id)
    local text = redis.call('HGET', leases, id)
    redis.call('ZREM', lease_ends, id)
    if not text then return 0 end
    redis.call('HDEL', leases, id)
    add_lent(cjson.decode(text), -1)
    return 1
end

local function is_whole()
    local offered, leased = redis.call('HLEN', offers), redis.call('HLEN', leases)
    for _, key in ipairs({offer_ends, rooms.blocks, rooms.host_bytes}) do
        if redis.call('ZCARD', key) ~= offered then return false end
    end
    if redis.call('ZCARD', lease_ends) ~= leased then return false end
    return (redis.call('HLEN', lent) > 0) == (leased > 0)
end

local function remove_ended()
    for _, lender in ipairs(redis.call('ZRANGEBYSCORE', offer_ends, '-inf', now)) do
        remove_offer(lender)
    end
    for _, id in ipairs(redis.call('ZRANGEBYSCORE', lease_ends, '-inf', now)) do
        remove_lease(id)
    end
end

-- Unreadable entries and keys of other types raise errors, for ever if they stayed.
local is_readable, is_kept = pcall(function()
    if not is_whole() then return false end
    remove_ended()
    return true
end)
if not (is_readable and is_kept) then redis.call('DEL', unpack(KEYS)) end

local function answer()
"""
_END = """
end
local answered = answer()
for _, key in ipairs(KEYS) do redis.call('PEXPIRE', key, %d) end
return answered
"""
# Far longer than any offer or lease: for applications that are gone.
_IDLE_MS = 3_600_000
_OFFER = """
redis.call('HSET', offers, ARGV[1], ARGV[2])
redis.call('ZADD', offer_ends, now + ARGV[3], ARGV[1])
rank(ARGV[1])
"""
_WITHDRAW = """
remove_offer(ARGV[1])
"""
_TAKE = """
local id, wanted, ttl = ARGV[1], cjson.decode(ARGV[2]), ARGV[3]
if redis.call('HEXISTS', leases, id) == 1 then return 1 end
local room = redis.call('ZSCORE', rooms[wanted.resource], wanted.lender)
if not room or tonumber(room) < wanted.amount then return 0 end
redis.call('HSET', leases, id, ARGV[2])
redis.call('ZADD', lease_ends, now + ttl, id)
add_lent(wanted, 1)
return 1
"""
_RENEW = """
local text = redis.call('HGET', leases, ARGV[1])
if not text or redis.call('HEXISTS', offers, cjson.decode(text).lender) == 0 then return 0 end
redis.call('ZADD', lease_ends, now + ARGV[2], ARGV[1])
return 1
"""
_GIVE_BACK = """
return remove_lease(ARGV[1])
"""
_BEST = """
local count, kind = tonumber(ARGV[1]), ARGV[2]
local best, seen = {}, {}

local function reads_kind(lender)
    local is_readable, offer = pcall(cjson.decode, redis.call('HGET', offers, lender))
    return is_readable and type(offer) == 'table' and (offer.cache_kind or '') == kind
end

local function add(lender)
    if seen[lender] then return end
    seen[lender] = true
    local blocks = redis.call('ZSCORE', rooms.blocks, lender)
    local host_bytes = redis.call('ZSCORE', rooms.host_bytes, lender)
    table.insert(best, {lender, blocks, host_bytes})
end

for _, key in pairs(rooms) do
    local found, first = 0, 0
    repeat
        local lenders = redis.call('ZREVRANGE', key, first, first + count - 1)
        for _, lender in ipairs(lenders) do
            if found < count and reads_kind(lender) then
                found = found + 1
                add(lender)
            end
        end
        first = first + count
    until found == count or #lenders < count
end
return best
"""
_READ = """
return {redis.call('HGETALL', offers), redis.call('HGETALL', leases)}
"""


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
        bodies = (_OFFER, _WITHDRAW, _TAKE, _RENEW, _GIVE_BACK, _BEST, _READ)
        end = _END % _IDLE_MS
        self._scripts = {body: self._client.register_script(_BEGIN + body + end) for body in bodies}

    async def offer(self, offer: Offer, ttl_s: float = OFFER_TTL_S) -> None:
        """Add or change a lender's offer for `ttl_s`. Repeat the call before they are over.

        An offer below what is lent ends no lease, but allows no new one.
        """
        fields = offer._asdict()
        lender = fields.pop("lender")
        await self._run(_OFFER, lender, json.dumps(fields), _ms(ttl_s))

    async def withdraw(self, lender: str) -> None:
        """Remove a lender's offer. Its leases cannot be renewed, and expire."""
        await self._run(_WITHDRAW, lender)

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
        return await self._run(_TAKE, lease_id, json.dumps(fields), _ms(ttl_s)) == 1

    async def renew(self, lease_id: str, ttl_s: float = LEASE_TTL_S) -> bool:
        """Make a lease last `ttl_s` from now. Return False if it or its offer has ended."""
        return await self._run(_RENEW, lease_id, _ms(ttl_s)) == 1

    async def give_back(self, lease_id: str) -> bool:
        """End a lease. Return False if it had ended before."""
        return await self._run(_GIVE_BACK, lease_id) == 1

    async def best(self, cache_kind: str = "", count: int = _BEST_LENDERS) -> list[Room]:
        """Return the lenders with the most room: `count` by blocks, and as many by host memory.

        The one with the most blocks comes first.

        Args:
            cache_kind: name of the kind of caches that they must be able to read.
        """
        found = cast(list[tuple[bytes, bytes, bytes]], await self._run(_BEST, count, cache_kind))
        rooms = [
            Room(_text(name), int(float(blocks)), int(float(size))) for name, blocks, size in found
        ]
        return sorted(rooms, key=lambda room: (-room.blocks, -room.host_bytes, room.lender))

    async def read(self) -> Lending:
        """Return all offers and leases, which takes long in a large fleet.

        Fields and resources that only a newer version knows, and unreadable entries, are left out.
        """
        offers, leases = cast(list[list[bytes]], await self._run(_READ))
        return Lending(
            sorted(filter(None, (_offer(*item) for item in _items(offers)))),
            sorted(filter(None, (_lease(*item) for item in _items(leases)))),
        )

    async def close(self) -> None:
        await self._client.aclose()

    async def _run(self, body: str, *arguments: str | int) -> object:
        return await self._scripts[body](keys=list(self._keys), args=list(arguments))


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
