"""Feeds a router's local view from the ledger, in the background of its event loop."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from typing import Any, cast

import redis
import redis.asyncio
from pydantic import ValidationError
from redis.asyncio.client import PubSub
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from router.ledger.occupancy import SchemaMismatch
from router.ledger.prefixes import PrefixChange
from router.ledger.redis_ledger import REPORT_TTL_S, SOCKET_TIMEOUT_S, LedgerKeys
from router.local_view import LocalView

logger = logging.getLogger(__name__)

_REREAD_S = 1.0
_RETRY_S = 0.5


class LedgerSubscription:
    """Listens to published reports, and reads all of them again every second.

    A lost store costs one warning; the view's reports grow stale, and fresh ones come as soon as
    the store is back.
    """

    def __init__(
        self,
        url: str,
        keys: LedgerKeys,
        view: LocalView,
        clock: Callable[[], float] = time.monotonic,
        on_prefixes: Callable[[PrefixChange], None] = lambda change: None,
    ) -> None:
        """
        Args:
            on_prefixes: called with each change of a replica's prefix cache.
        """
        self._keys = keys
        self._view = view
        self._clock = clock
        self._on_prefixes = on_prefixes
        self._lost = False
        self._client = redis.asyncio.Redis.from_url(
            url,
            socket_timeout=SOCKET_TIMEOUT_S,
            socket_connect_timeout=SOCKET_TIMEOUT_S,
            retry=Retry(NoBackoff(), 0),
        )

    async def run(self) -> None:
        """Runs until cancelled."""
        try:
            while True:
                try:
                    async with self._client.pubsub(ignore_subscribe_messages=True) as pubsub:
                        await self._listen(pubsub)
                except (redis.RedisError, OSError) as error:
                    self._note_loss(error)
                await asyncio.sleep(_RETRY_S)
        finally:
            await self._client.aclose()

    async def _listen(self, pubsub: PubSub) -> None:
        await pubsub.subscribe(self._keys.channel, self._keys.prefix_channel)
        reread_at = self._clock()
        while True:
            now = self._clock()
            if now >= reread_at:
                await self._read_all()
                reread_at = now + _REREAD_S
            message = await pubsub.get_message(timeout=max(0.0, reread_at - now))
            if message is not None:
                self._take(message)

    def _take(self, message: dict[str, Any]) -> None:
        if message["channel"] != self._keys.prefix_channel.encode():
            self._view.receive(message["data"], self._clock())
            return
        # What cannot be read only makes the affinity a little more approximate.
        with contextlib.suppress(ValidationError, SchemaMismatch):
            self._on_prefixes(PrefixChange.parse(message["data"]))

    async def _read_all(self) -> None:
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
            for payload, remaining_ms in zip(answers[::2], answers[1::2], strict=True):
                if payload is not None:
                    age_s = max(0.0, REPORT_TTL_S - remaining_ms / 1000)
                    self._view.receive(payload, now - age_s)
        if self._lost:
            logger.info("occupancy store is back")
        self._lost = False

    def _note_loss(self, error: Exception) -> None:
        if not self._lost:
            logger.warning("occupancy store lost, routing by queue lengths: %s", error)
        self._lost = True
