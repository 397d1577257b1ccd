"""The subscription that feeds a router's local view from the ledger."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any, cast

import redis
import redis.asyncio
from pydantic import ValidationError
from redis.asyncio.client import PubSub

from router.ledger.occupancy import REPORT_TTL_S, SchemaMismatch
from router.ledger.prefixes import PrefixChange
from router.ledger.redis_ledger import LedgerKeys, connect
from router.ledger.sendings import Sendings
from router.local_view import LocalView

logger = logging.getLogger(__name__)

_REREAD_S = 1.0
# Reports that are read again in a second, beside those that are published.
_REREAD_PER_S = 100
_RETRY_S = 0.5


class LedgerSubscription:
    """Listener to published reports, which also reads all reports now and then.

    That is every second in a small fleet, and less often in a large one.
    It logs a lost store once and retries. Meanwhile the reports in the view grow stale.
    """

    def __init__(
        self,
        url: str,
        keys: LedgerKeys,
        view: LocalView,
        clock: Callable[[], float] = time.monotonic,
        on_prefixes: Callable[[PrefixChange], None] = lambda change: None,
        on_sendings: Callable[[Sendings], None] = lambda sendings: None,
        ttl_s: float = REPORT_TTL_S,
    ) -> None:
        """
        Args:
            on_prefixes: called with each change of a replica's prefix cache.
            on_sendings: called with what each ingress has sent, this one included.
            ttl_s: time to live of the reports, as their writers set it.
        """
        self._keys = keys
        self._view = view
        self._clock = clock
        self._on_prefixes = on_prefixes
        self._on_sendings = on_sendings
        self._ttl_s = ttl_s
        self._lost = False
        self._client = connect(url)

    async def run(self) -> None:
        """Feed the view until the task is cancelled."""
        try:
            while True:
                try:
                    async with self._client.pubsub(ignore_subscribe_messages=True) as pubsub:
                        await self._listen(pubsub)
                    break
                except Exception as error:
                    self._note_loss(error)
                await asyncio.sleep(_RETRY_S)
        finally:
            await self._client.aclose()

    async def _listen(self, pubsub: PubSub) -> None:
        keys = self._keys
        await pubsub.subscribe(keys.channel, keys.prefix_channel, keys.sendings_channel)
        reread_at = self._clock()
        task = asyncio.current_task()
        # redis-py uses `asyncio.wait_for`, which before Python 3.12 can swallow a cancellation.
        while task is None or not task.cancelling():
            now = self._clock()
            if now >= reread_at:
                replicas = await self._read_all()
                reread_at = now + max(_REREAD_S, replicas / _REREAD_PER_S)
            message = await pubsub.get_message(timeout=max(0.0, reread_at - now))
            if message is not None:
                self._take(message)

    def _take(self, message: dict[str, Any]) -> None:
        channel, data = message["channel"].decode(), message["data"]
        # Affinity and others' bookings are approximate anyway.
        with contextlib.suppress(ValidationError, SchemaMismatch):
            if channel == self._keys.prefix_channel:
                self._on_prefixes(PrefixChange.parse(data))
            elif channel == self._keys.sendings_channel:
                self._on_sendings(Sendings.parse(data))
            else:
                self._view.receive(data, self._clock())

    async def _read_all(self) -> int:
        """Read all reports, and remove the ids of expired ones; return their number."""
        keys = self._keys
        members = cast(set[bytes], await self._client.smembers(keys.members))
        ids = [member.decode() for member in members]
        if ids:
            async with self._client.pipeline(transaction=False) as pipe:
                for replica_id in ids:
                    pipe.get(keys.replica(replica_id))
                    pipe.pttl(keys.replica(replica_id))
                answers = await pipe.execute()
            now = self._clock()
            reports = zip(ids, answers[::2], answers[1::2], strict=True)
            expired = []
            for replica_id, payload, remaining_ms in reports:
                if payload is None:
                    expired.append(replica_id)
                else:
                    age_s = max(0.0, self._ttl_s - remaining_ms / 1000)
                    self._view.receive(payload, now - age_s)
            if expired:
                # A replica that is only slow adds its id again with its next report.
                await cast(Awaitable[int], self._client.srem(keys.members, *expired))
        if self._lost:
            logger.info("occupancy store is back")
        self._lost = False
        return len(ids)

    def _note_loss(self, error: Exception) -> None:
        if self._lost:
            return
        self._lost = True
        if isinstance(error, redis.RedisError | OSError):
            logger.warning("occupancy store lost, routing by queue lengths: %s", error)
        else:
            logger.error("the occupancy subscription failed and starts again", exc_info=error)
