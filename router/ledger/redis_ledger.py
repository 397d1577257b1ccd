"""The live ledger in Redis: the latest report of each replica, which expires by itself.

Keys, under `{prefix}:{application}:`
    live                  sorted set of the ids of replicas with a report, by its end
    replica:{id}          the report as JSON, expiring after `ttl_s`
Channels, under the same prefix:
    occupancy             each report
    prefixes              changes of prefix caches, which are not stored
    sendings              what each ingress has sent where, not stored either

Ages come from Redis' remaining time to live, so the clocks of machines need not agree. All keys
expire, and the set loses the ids of expired reports with each new one.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import redis
import redis.asyncio
from pydantic import ValidationError
from redis.commands.core import AsyncScript

from adakv_serve.router.ledger.occupancy import REPORT_TTL_S, Occupancy, Report, SchemaMismatch
from adakv_serve.router.ledger.prefixes import PrefixChange
from adakv_serve.router.ledger.sendings import Sendings
from adakv_serve.router.ledger.store_client import connect, connect_blocking

# Reports of all replicas together, which an ingress reads and the store takes.
_REPORTS_PER_S = 1000
# Shorter gaps give readers nothing, and each report takes host time from the engine.
_LEAST_GAP_S = 0.1
# A report that is older would count as lost.
_MOST_GAP_S = REPORT_TTL_S / 2


def report_gap_s(replicas: int) -> float:
    """Return the least time between two reports of a replica in a fleet of `replicas`.

    Between reports routers count what has been sent to a replica since.
    """
    return min(max(_LEAST_GAP_S, replicas / _REPORTS_PER_S), _MOST_GAP_S)


class LedgerView(NamedTuple):
    """All live reports by replica id, and the number of reports that could not be read.

    store_keys: how many keys the store's database has, of whatever kind; 0 if unknown.
    """

    reports: list[Report]
    dropped: int
    store_keys: int = 0


class LedgerKeys(NamedTuple):
    prefix: str
    application: str

    @property
    def members(self) -> str:
        return f"{self.prefix}:{self.application}:live"

    @property
    def channel(self) -> str:
        return f"{self.prefix}:{self.application}:occupancy"

    @property
    def prefix_channel(self) -> str:
        return f"{self.prefix}:{self.application}:prefixes"

    @property
    def sendings_channel(self) -> str:
        return f"{self.prefix}:{self.application}:sendings"

    def replica(self, replica_id: str) -> str:
        return f"{self.prefix}:{self.application}:replica:{replica_id}"

    def replica_of(self, member: bytes) -> bytes:
        """Return the key of a member of the set, which may be no replica's id."""
        return self.replica("").encode() + member


# First brings the index up to date. Another kind of key in its place is none of ours.
_BEGIN = """
local live = KEYS[1]
local kind = redis.call('TYPE', live).ok
if kind ~= 'zset' and kind ~= 'none' then redis.call('DEL', live) end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('ZREMRANGEBYSCORE', live, '-inf', now)
"""
_REPORT = """
local id, report, ttl, channel = ARGV[1], ARGV[2], tonumber(ARGV[3]), ARGV[4]
redis.call('SET', KEYS[2], report, 'PX', ttl)
redis.call('ZADD', live, now + ttl, id)
if redis.call('PTTL', live) < ttl then redis.call('PEXPIRE', live, ttl) end
redis.call('PUBLISH', channel, report)
return redis.call('ZCARD', live)
"""
# A write even if nothing has expired, so that a former primary refuses it.
_LIVE = """
return redis.call('ZRANGE', live, 0, -1)
"""


def live_script(client: redis.asyncio.Redis) -> AsyncScript:
    """Return the script that removes expired ids from the key `members` and returns the others."""
    return client.register_script(_BEGIN + _LIVE)


class StoredReport(NamedTuple):
    """What is stored for an id of `members`.

    payload: None if nothing is; a WRONGTYPE error if it is no report.
    """

    member: bytes
    payload: bytes | redis.ResponseError | None
    age_s: float


def stored_reports(
    members: Sequence[bytes], answers: Sequence[Any], ttl_s: float
) -> Iterator[StoredReport]:
    """Yield the reports in answers to GET and PTTL of each member's key.

    Raises:
        redis.ResponseError: the store has refused a command.
    """
    for member, payload, remaining_ms in zip(members, answers[::2], answers[1::2], strict=True):
        for answer in (payload, remaining_ms):
            if isinstance(answer, Exception) and "WRONGTYPE" not in str(answer):
                raise answer
        yield StoredReport(member, payload, max(0.0, ttl_s - remaining_ms / 1000))


class LedgerWriter:
    """Publisher of one replica's reports, or of one ingress' sendings, for one event loop.

    Every method raises `redis.RedisError` when the store is unreachable or slower than
    `SOCKET_TIMEOUT_S`.
    """

    def __init__(self, url: str, keys: LedgerKeys, ttl_s: float = REPORT_TTL_S) -> None:
        self._keys = keys
        self._ttl_ms = round(ttl_s * 1000)
        self._client = connect(url)
        self._report = self._client.register_script(_BEGIN + _REPORT)

    async def publish(self, occupancy: Occupancy) -> int:
        """Publish a report; return the number of replicas that have one."""
        replica_id, keys = occupancy.replica_id, self._keys
        payload = occupancy.model_dump_json()
        replicas: int = await self._report(
            keys=[keys.members, keys.replica(replica_id)],
            args=[replica_id, payload, self._ttl_ms, keys.channel],
        )
        return replicas

    async def publish_prefixes(self, change: PrefixChange) -> None:
        await self._client.publish(self._keys.prefix_channel, change.model_dump_json())

    async def publish_sendings(self, sendings: Sendings) -> None:
        await self._client.publish(self._keys.sendings_channel, sendings.model_dump_json())

    async def withdraw(self, replica_id: str) -> None:
        """Remove the replica's report, when it shuts down."""
        async with self._client.pipeline(transaction=False) as pipe:
            pipe.delete(self._keys.replica(replica_id))
            pipe.zrem(self._keys.members, replica_id)
            await pipe.execute()

    async def close(self) -> None:
        await self._client.aclose()


class LedgerReader:
    """Blocking reader of all live reports of one application, for commands and tests."""

    def __init__(self, url: str, keys: LedgerKeys, ttl_s: float = REPORT_TTL_S) -> None:
        self._keys = keys
        self._ttl_s = ttl_s
        self._client = connect_blocking(url)
        self._live = self._client.register_script(_BEGIN + _LIVE)

    def read(self) -> LedgerView:
        """Return every live report, and remove the ids of expired ones.

        Raises:
            redis.RedisError: the store is unreachable.
        """
        members = sorted(cast(list[bytes], self._live(keys=[self._keys.members])))
        with self._client.pipeline(transaction=False) as pipe:
            for member in members:
                pipe.get(self._keys.replica_of(member))
                pipe.pttl(self._keys.replica_of(member))
            pipe.dbsize()
            *answers, keys = pipe.execute(raise_on_error=False)
        reports: list[Report] = []
        dropped = 0
        for stored in stored_reports(members, answers, self._ttl_s):
            if stored.payload is None:
                self._client.zrem(self._keys.members, stored.member)
                continue
            try:
                if isinstance(stored.payload, Exception):
                    raise stored.payload
                occupancy = Occupancy.parse(stored.payload)
            except (redis.ResponseError, ValidationError, SchemaMismatch):
                dropped += 1
                continue
            reports.append(Report(occupancy, stored.age_s))
        # A user of the store may lack the right to count.
        return LedgerView(reports, dropped, keys if isinstance(keys, int) else 0)

    def close(self) -> None:
        self._client.close()
