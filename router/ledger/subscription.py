"""The subscription that feeds a router's local view from the ledger."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, cast

import redis
import redis.asyncio
from pydantic import ValidationError
from redis.asyncio.client import PubSub

from adakv_serve.router.ledger.occupancy import REPORT_TTL_S, SchemaMismatch
from adakv_serve.router.ledger.prefixes import PrefixChange
from adakv_serve.router.ledger.redis_ledger import LedgerKeys, live_script, stored_reports
from adakv_serve.router.ledger.sendings import Sendings
from adakv_serve.router.ledger.store_client import connect
from adakv_serve.router.local_view import LocalView

logger = logging.getLogger(__name__)

_REREAD_S = 1.0
# Reports that are read again in a second, beside those that are published.
_REREAD_PER_S = 100
_RETRY_S = 0.5
# Least time between two log lines about messages that raise errors.
_FAULT_LOG_S = 10.0


class LedgerSubscription:
    """Listener to published reports, which also reads all reports now and then.

    That is every second in a small fleet, and less often in a large one.
    It logs a lost store once and retries. Meanwhile the reports in the view grow stale.

    dropped: messages that could not be taken, besides the malformed reports that the view counts.
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
        self._log_faults_at = float("-inf")
        self.dropped = 0
        self._client = connect(url)
        self._live = live_script(self._client)

    async def run(self) -> None:
        """Feed the view until the task is cancelled.

        Raises:
            Exception: a fault other than a lost store. Call it again, to go on.
        """
        try:
            while True:
                try:
                    async with self._client.pubsub(ignore_subscribe_messages=True) as pubsub:
                        await self._listen(pubsub)
                    break
                except (redis.RedisError, OSError) as error:
                    if not self._lost:
                        logger.warning("occupancy store lost, routing by queue lengths: %s", error)
                    self._lost = True
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
        channel, data = message["channel"], message["data"]
        if channel == self._keys.prefix_channel.encode():
            self._deliver(lambda: self._on_prefixes(PrefixChange.parse(data)))
        elif channel == self._keys.sendings_channel.encode():
            self._deliver(lambda: self._on_sendings(Sendings.parse(data)))
        else:
            self._deliver(lambda: self._view.receive(data, self._clock()))

    def _deliver(self, deliver: Callable[[], None]) -> None:
        """Deliver a message, or drop and count it: the next one gets its turn in any case."""
        try:
            deliver()
        except (ValidationError, SchemaMismatch):
            self.dropped += 1
        except Exception:
            self.dropped += 1
            # Others of its kind may follow.
            if self._clock() >= self._log_faults_at:
                self._log_faults_at = self._clock() + _FAULT_LOG_S
                logger.exception("a message of the ledger cannot be taken")

    async def _read_all(self) -> int:
        """Read all reports, and remove the ids of expired ones; return their number."""
        keys = self._keys
        members: list[bytes] = await self._live(keys=[keys.members])
        if members:
            async with self._client.pipeline(transaction=False) as pipe:
                for member in members:
                    pipe.get(keys.replica_of(member))
                    pipe.pttl(keys.replica_of(member))
                answers = await pipe.execute(raise_on_error=False)
            expired = self._take_stored(members, answers)
            if expired:
                # A replica that is only slow adds its id again with its next report.
                await cast(Awaitable[int], self._client.zrem(keys.members, *expired))
        if self._lost:
            logger.info("occupancy store is back")
        self._lost = False
        return len(members)

    def _take_stored(self, members: list[bytes], answers: list[Any]) -> list[bytes]:
        """Take the stored reports; return the ids without one."""
        now, expired = self._clock(), []
        for stored in stored_reports(members, answers, self._ttl_s):
            payload, age_s = stored.payload, stored.age_s
            if payload is None:
                expired.append(stored.member)
            elif isinstance(payload, bytes):
                self._deliver(partial(self._view.receive, payload, now - age_s))
            else:
                self.dropped += 1
        return expired
