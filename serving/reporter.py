"""Publishes a replica's occupancy and its cached prefixes to the ledger."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Callable
from typing import TYPE_CHECKING, Protocol

import redis

from adakv_serve.router.ledger.occupancy import Occupancy
from adakv_serve.router.ledger.prefixes import PrefixChange
from adakv_serve.router.ledger.redis_ledger import LedgerKeys, LedgerWriter, report_gap_s
from adakv_serve.serving.supervision import KeptTask, Supervisor

if TYPE_CHECKING:
    # The ingress imports this module through the application and does not need vLLM.
    from adakv_serve.serving.vllm_engine.load import EngineLoad
    from adakv_worker.frontend.kv_events import CacheChange

logger = logging.getLogger("ray.serve")


class LoadSource(Protocol):
    """Where a reporter reads the load, and waits for its changes."""

    def load(self) -> "EngineLoad": ...

    @property
    def silent(self) -> bool: ...

    @property
    def changed(self) -> asyncio.Event: ...


class OccupancyReporter:
    """Reports on change, and at least every interval, in one background task.

    In a larger fleet the least time between two reports is longer.

    Without the store it logs a warning and serving continues. Nothing is reported while the engine
    is silent: its statistics are of a time when it still worked.
    """

    def __init__(
        self,
        *,
        source: LoadSource,
        url: str,
        keys: LedgerKeys,
        replica_id: str,
        model: str,
        interval_s: float,
        on_report: Callable[[Occupancy], None] = lambda occupancy: None,
    ) -> None:
        """
        Args:
            on_report: called with each report, whether the store takes it or not.
        """
        self._source = source
        self._on_report = on_report
        self._writer = LedgerWriter(url, keys)
        self._replica_id = replica_id
        self._model = model
        self._interval_s = interval_s
        self._gap_s = report_gap_s(1)
        self._epoch = time.time_ns()
        self._sequence = 0
        self._store_lost = False
        self._reported: EngineLoad | None = None
        self._task: KeptTask | None = None

    def start(self, tasks: Supervisor) -> None:
        self._task = tasks.keep("reports", self._run)

    async def stop(self) -> None:
        """Withdraw the report, so that routers send no more requests here."""
        if self._task is not None:
            # Else a report on its way could arrive after the withdrawal.
            await self._task.stop()
        await self._withdraw()
        with contextlib.suppress(redis.RedisError, OSError):
            await self._writer.close()

    async def _withdraw(self) -> None:
        # Else the report expires by itself.
        with contextlib.suppress(redis.RedisError, OSError):
            await self._writer.withdraw(self._replica_id)

    async def _run(self) -> None:
        while True:
            if self._source.silent:
                await self._withdraw()
            else:
                await self._publish()
            await self._wait_for_news()

    async def _wait_for_news(self) -> None:
        """Return when the load differs from the last report, or the interval is over."""
        loop = asyncio.get_running_loop()
        due = loop.time() + self._interval_s
        await asyncio.sleep(self._gap_s)
        while _reportable(self._source.load()) == self._reported and loop.time() < due:
            self._source.changed.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._source.changed.wait(), due - loop.time())

    async def _publish(self) -> None:
        self._sequence += 1
        occupancy = self._occupancy()
        self._on_report(occupancy)
        try:
            self._gap_s = report_gap_s(await self._writer.publish(occupancy))
        except (redis.RedisError, OSError) as error:
            if not self._store_lost:
                logger.warning("occupancy store lost, serving goes on: %s", error)
            self._store_lost = True
            return
        if self._store_lost:
            logger.info("occupancy store is back")
        self._store_lost = False

    def _occupancy(self) -> Occupancy:
        load = self._source.load()
        self._reported = _reportable(load)
        return Occupancy(
            replica_id=self._replica_id,
            model=self._model,
            epoch=self._epoch,
            sequence=self._sequence,
            **load._asdict(),
        )


def _reportable(load: "EngineLoad") -> "EngineLoad":
    """Return the load without its rates and time, which change in every step and can wait."""
    return load._replace(
        decode_tokens_per_s=0.0, prefill_tokens_per_s=0.0, decode_steps_per_s=None, told_at=0.0
    )


class PrefixWriter(Protocol):
    """Where changes of the prefix cache are published."""

    async def publish_prefixes(self, change: PrefixChange) -> None: ...


async def report_prefixes(
    follow: "Callable[[], AsyncGenerator[CacheChange, None] | None]",
    writer: PrefixWriter,
    replica_id: str,
) -> None:
    """Publish changes of the prefix cache until cancelled.

    What came before is unknown, so the first change is marked as cleared, as is the next one after
    the store has missed one. Otherwise routers would go on counting blocks that were evicted.

    Args:
        follow: starts to listen to the engine; returns None if the engine publishes no events.

    Raises:
        Exception: the engine's events cannot be read. Call it again, to listen again.
    """
    if (changes := follow()) is None:
        return
    missed = not await _published(writer, PrefixChange(replica_id=replica_id, cleared=True))
    async with contextlib.aclosing(changes):
        async for change in changes:
            cleared = change.cleared or missed
            news = PrefixChange(replica_id=replica_id, **change._asdict() | {"cleared": cleared})
            missed = not await _published(writer, news)
    raise RuntimeError("the engine's KV events have ended")


async def _published(writer: PrefixWriter, change: PrefixChange) -> bool:
    """Publish a change; return whether the store has taken it."""
    try:
        await writer.publish_prefixes(change)
    except (redis.RedisError, OSError):
        return False
    return True
