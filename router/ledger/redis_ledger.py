"""The live ledger in Redis: the latest report of each replica, which expires by itself.

Keys, under `{prefix}:{application}:`
    replicas              set of the ids of replicas with a report
    replica:{id}          the report as JSON, expiring after `ttl_s`
Channels, under the same prefix:
    occupancy             each report
    prefixes              changes of prefix caches, which are not stored
    sendings              what each ingress has sent where, not stored either

Ages come from Redis' remaining time to live, so the clocks of machines need not agree.
"""

from typing import NamedTuple, cast

import redis
import redis.asyncio
from pydantic import ValidationError
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.retry import Retry

from router.ledger.occupancy import REPORT_TTL_S, Occupancy, SchemaMismatch
from router.ledger.prefixes import PrefixChange
from router.ledger.sendings import Sendings

SOCKET_TIMEOUT_S = 1.0
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


class Report(NamedTuple):
    occupancy: Occupancy
    age_s: float


class LedgerView(NamedTuple):
    """All live reports by replica id, and the number of reports that could not be read."""

    reports: list[Report]
    dropped: int


class LedgerKeys(NamedTuple):
    prefix: str
    application: str

    @property
    def members(self) -> str:
        return f"{self.prefix}:{self.application}:replicas"

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


def connect(url: str, timeout_s: float = SOCKET_TIMEOUT_S) -> redis.asyncio.Redis:
    """Return a client whose calls take `timeout_s` at most, without redis-py's seconds of retries.

    A report that late would be worth nothing.
    """
    return redis.asyncio.Redis.from_url(
        url,
        socket_timeout=timeout_s,
        socket_connect_timeout=timeout_s,
        retry=AsyncRetry(NoBackoff(), 0),
    )


class LedgerWriter:
    """Publisher of one replica's reports, or of one ingress' sendings, for one event loop.

    Every method raises `redis.RedisError` when the store is unreachable or slower than
    `SOCKET_TIMEOUT_S`.
    """

    def __init__(self, url: str, keys: LedgerKeys, ttl_s: float = REPORT_TTL_S) -> None:
        self._keys = keys
        self._ttl_ms = round(ttl_s * 1000)
        self._client = connect(url)

    async def publish(self, occupancy: Occupancy) -> int:
        """Publish a report; return the number of replicas that have one."""
        payload = occupancy.model_dump_json()
        async with self._client.pipeline(transaction=False) as pipe:
            pipe.set(self._keys.replica(occupancy.replica_id), payload, px=self._ttl_ms)
            pipe.sadd(self._keys.members, occupancy.replica_id)
            pipe.publish(self._keys.channel, payload)
            pipe.scard(self._keys.members)
            replicas: int = (await pipe.execute())[-1]
        return replicas

    async def publish_prefixes(self, change: PrefixChange) -> None:
        await self._client.publish(self._keys.prefix_channel, change.model_dump_json())

    async def publish_sendings(self, sendings: Sendings) -> None:
        await self._client.publish(self._keys.sendings_channel, sendings.model_dump_json())

    async def withdraw(self, replica_id: str) -> None:
        """Remove the replica's report, when it shuts down."""
        async with self._client.pipeline(transaction=True) as pipe:
            pipe.delete(self._keys.replica(replica_id))
            pipe.srem(self._keys.members, replica_id)
            await pipe.execute()

    async def close(self) -> None:
        await self._client.aclose()


class LedgerReader:
    """Blocking reader of all live reports of one application, for commands and tests."""

    def __init__(self, url: str, keys: LedgerKeys, ttl_s: float = REPORT_TTL_S) -> None:
        self._keys = keys
        self._ttl_ms = round(ttl_s * 1000)
        self._client = redis.Redis.from_url(
            url,
            socket_timeout=SOCKET_TIMEOUT_S,
            socket_connect_timeout=SOCKET_TIMEOUT_S,
            retry=Retry(NoBackoff(), 0),
        )

    def read(self) -> LedgerView:
        """Return every live report, and remove the ids of expired ones.

        Raises:
            redis.RedisError: the store is unreachable.
        """
        members = cast(set[bytes], self._client.smembers(self._keys.members))
        ids = sorted(member.decode() for member in members)
        with self._client.pipeline(transaction=False) as pipe:
            for replica_id in ids:
                pipe.get(self._keys.replica(replica_id))
                pipe.pttl(self._keys.replica(replica_id))
            answers = pipe.execute()
        reports: list[Report] = []
        dropped = 0
        for replica_id, payload, remaining_ms in zip(ids, answers[::2], answers[1::2], strict=True):
            if payload is None:
                self._client.srem(self._keys.members, replica_id)
                continue
            try:
                occupancy = Occupancy.parse(payload)
            except (ValidationError, SchemaMismatch):
                dropped += 1
                continue
            reports.append(Report(occupancy, max(0.0, (self._ttl_ms - remaining_ms) / 1000)))
        return LedgerView(reports, dropped)

    def close(self) -> None:
        self._client.close()
