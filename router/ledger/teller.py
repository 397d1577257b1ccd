"""Tells the other ingresses what this one has sent."""

import asyncio
import contextlib

import redis

from adakv_serve.router.ledger.redis_ledger import LedgerKeys, LedgerWriter
from adakv_serve.router.ledger.sendings import Sending, Sendings

# Time in which sendings are collected for one message.
_COLLECT_S = 0.03


class Teller:
    """Publishes sendings, some at once. While the store is lost they are lost."""

    def __init__(self, url: str, keys: LedgerKeys, ingress_id: str) -> None:
        self._writer = LedgerWriter(url, keys)
        self._ingress_id = ingress_id
        self._untold: list[Sending] = []
        self._has_untold = asyncio.Event()

    def tell(self, sending: Sending) -> None:
        """Publish a sending soon."""
        self._untold.append(sending)
        self._has_untold.set()

    async def run(self) -> None:
        """Publish until the task is cancelled."""
        try:
            while True:
                await self._has_untold.wait()
                await asyncio.sleep(_COLLECT_S)
                self._has_untold.clear()
                sent, self._untold = self._untold, []
                # The subscription warns of a lost store.
                with contextlib.suppress(redis.RedisError, OSError):
                    sendings = Sendings(ingress_id=self._ingress_id, sent=sent)
                    await self._writer.publish_sendings(sendings)
        finally:
            await self._writer.close()
