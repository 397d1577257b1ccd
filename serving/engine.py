"""The `Engine` deployment: one vLLM engine per replica, with vLLM's own OpenAI app in process."""

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator

from ray import serve

from adakv_worker.config import RequestOptions
from router.autoscaling import ReplicaDemand
from router.footprint import Footprint
from router.redis_ledger import LedgerKeys
from serving.asgi import Message, call_app
from serving.compression_metrics import CompressionMetrics
from serving.config import AppConfig
from serving.embedded_model import EMBEDDED_MODEL_NAME, embedded_model_path
from serving.front_door import ReplicaLost
from serving.occupancy_metrics import OccupancyMetrics
from serving.openai_error import error_messages
from serving.reporter import OccupancyReporter, report_prefixes
from serving.store import store_url

logger = logging.getLogger("ray.serve")

REPLICA_HEADER = b"x-replica-id"


class Engine:
    async def __init__(self, config: AppConfig) -> None:  # type: ignore[misc]  # Serve awaits it
        # Imported here: it is heavy, and thread counts must be set before torch loads.
        from serving import vllm_host

        vllm_host.set_up_cpu(config.replica.threads, config.tensor_parallel_size)
        context = serve.get_replica_context()
        self._signature = (REPLICA_HEADER, context.replica_id.unique_id.encode())
        compression = config.compression
        self._compression = compression if compression and compression.enabled else None
        path, name = model_path_and_name(config)
        started = time.monotonic()
        self._host = await vllm_host.VllmHost.start(
            path,
            name,
            config.engine,
            config.server,
            config.compression,
            CompressionMetrics().note,
        )
        logger.info(
            "engine ready: model=%s path=%s seconds=%.0f", name, path, time.monotonic() - started
        )
        url, replica_id = store_url(config.store), context.replica_id.unique_id
        keys = LedgerKeys(config.store.key_prefix, context.app_name)
        self._reporter = OccupancyReporter(
            source=self._host,
            url=url,
            keys=keys,
            replica_id=replica_id,
            model=name,
            interval_s=config.store.report_interval_s,
            on_report=OccupancyMetrics().note,
        )
        self._reporter.start()
        if changes := self._host.cache_changes():
            self._prefixes = asyncio.create_task(report_prefixes(changes, url, keys, replica_id))

    async def asgi(
        self, scope: dict, body: bytes, footprint: Footprint | None = None
    ) -> AsyncIterator[list[Message]]:
        """Answers one HTTP request; yields batches of ASGI response messages.

        Args:
            footprint: what the request router chose this replica by.

        Raises:
            ReplicaLost: the engine died before anything of the answer was sent.
        """
        if problem := self._bad_options(body):
            start, *rest = error_messages(400, problem, type_="BadRequestError", param="vllm_xargs")
            yield [self._signed(start), *rest]
            return
        begun = False
        async for batch in call_app(self._host.app, scope, body):
            if not begun and batch[0].get("status", 0) >= 500 and self._host.dead:
                raise ReplicaLost("the engine process died")
            if not begun:
                batch[0] = self._signed(batch[0])
            begun = True
            yield batch

    def _signed(self, start: Message) -> Message:
        """The response's start, with the replica that answers named in a header."""
        return {**start, "headers": [*start.get("headers", ()), self._signature]}

    def _bad_options(self, body: bytes) -> str | None:
        """What is wrong with the request's compression options.

        vLLM would say so too, but in a stream only after it has answered 200.
        """
        if self._compression is None or b"adakv_" not in body:
            return None
        try:
            options = json.loads(body).get("vllm_xargs")
            RequestOptions.of(options).budget(self._compression)
        except (ValueError, AttributeError, TypeError) as error:
            # Anything but an option is vLLM's to refuse.
            return str(error) if type(error) is ValueError else None
        return None

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What `serving.autoscaling.OccupancyPolicy` decides by."""
        load = self._host.load()
        demand = ReplicaDemand(
            blocks_total=load.blocks_total,
            held_blocks=load.blocks_total - load.blocks_free,
            growth_blocks=load.blocks_reserved_growth,
            waiting_blocks=load.waiting_blocks or 0,
            prefill_tokens_queued=load.prefill_tokens_queued,
            requests=load.running + load.waiting,
        )
        return demand.model_dump()

    async def ping(self) -> None:
        await self._host.check()

    async def check_health(self) -> None:
        await self._host.check()

    async def __del__(self) -> None:
        if prefixes := getattr(self, "_prefixes", None):
            prefixes.cancel()
        if reporter := getattr(self, "_reporter", None):
            await reporter.stop()
        if host := getattr(self, "_host", None):
            host.shutdown()


def model_path_and_name(config: AppConfig) -> tuple[str, str]:
    if config.model.path is None:
        return str(embedded_model_path()), config.model.name or EMBEDDED_MODEL_NAME
    path = config.model.path
    return path, config.model.name or path.rstrip("/").rsplit("/", 1)[-1]
