"""The `Engine` deployment: each replica has a vLLM engine and vLLM's own OpenAI app."""

import contextlib
import functools
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator
from typing import TYPE_CHECKING, Any

import psutil
import ray
from ray import serve
from ray.serve.handle import DeploymentHandle

from adakv_serve.router.autoscaling import ReplicaDemand
from adakv_serve.router.footprint import Footprint
from adakv_serve.router.ledger.redis_ledger import LedgerKeys, LedgerWriter
from adakv_serve.router.lending.leases import Lease
from adakv_serve.serving.config import AppConfig
from adakv_serve.serving.http.asgi import Message, Scope
from adakv_serve.serving.http.failures import ReplicaDown
from adakv_serve.serving.http.replica_answers import ReplicaAnswers
from adakv_serve.serving.http.tenants import HOLDER
from adakv_serve.serving.ingress.occupancy_router import OccupancyRouter
from adakv_serve.serving.janitor import Estate, Janitor
from adakv_serve.serving.kept_logs import kept_logs
from adakv_serve.serving.metrics import CompressionMetrics, OccupancyMetrics, TaskMetrics
from adakv_serve.serving.models.embedded import model_path_and_name
from adakv_serve.serving.reporter import OccupancyReporter, report_prefixes
from adakv_serve.serving.spill.parcels import Guest, LenderName
from adakv_serve.serving.spill.peers import Addressee
from adakv_serve.serving.spill.replica import ReplicaSpill
from adakv_serve.serving.spill.sessions import Destination, Parcel, SessionTraffic
from adakv_serve.serving.store import store_url
from adakv_serve.serving.supervision import Supervisor

if TYPE_CHECKING:
    from adakv_worker.frontend.moving import Decoded
    from adakv_worker.frontend.session_moves import SessionAsk

logger = logging.getLogger("ray.serve")


class Engine:
    """One replica: answers HTTP requests, reports its load, lends and borrows memory."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, config: AppConfig, lenders: DeploymentHandle[Any] | None = None
    ) -> None:
        """
        Args:
            lenders: another deployment of this class, which gets only moved requests.
        """
        # A slow import, needed only in a replica. vLLM configures logging meanwhile.
        with kept_logs():
            from adakv_serve.serving.vllm_engine import host as vllm_host

        vllm_host.set_up_cpu(config.replica.threads, config.tensor_parallel_size)
        self._replica_id = serve.get_replica_context().replica_id.unique_id
        # Before the engine: a wrong store shows at once.
        url, context = store_url(config.store), serve.get_replica_context()
        path, name = model_path_and_name(config.model)
        started = time.monotonic()
        with kept_logs():
            self._host = await vllm_host.VllmHost.start(
                path,
                name,
                config.engine,
                config.server,
                config.compression,
                CompressionMetrics().note,
                movable=config.spill.enabled,
                hang_s=config.replica.hang_s,
            )
        host = self._host
        self._answers = ReplicaAnswers(host.app, lambda: host.dead, self._replica_id)
        logger.info(
            "engine ready: model=%s path=%s seconds=%.0f", name, path, time.monotonic() - started
        )
        keys = LedgerKeys(config.store.key_prefix, context.app_name)
        self._tasks = Supervisor(TaskMetrics().note)
        self._spill: ReplicaSpill | None = None
        if config.spill.enabled:
            node_id = ray.get_runtime_context().get_node_id()
            lender = LenderName(context.deployment, self._replica_id, node_id)
            self._spill = ReplicaSpill(self._host, config, url, keys, lender, lenders, self._tasks)
            OccupancyRouter.membership = self._spill.membership
            self._spill.start()
        self._start_reports(url, keys, name, config.store.report_interval_s)
        # Later than the engine, which must not inherit what tells of this process' end.
        self._janitor = Janitor(Estate.of(psutil.Process(), config.spill.folder))

    def _start_reports(self, url: str, keys: LedgerKeys, model: str, interval_s: float) -> None:
        self._reporter = OccupancyReporter(
            source=self._spill or self._host,
            url=url,
            keys=keys,
            replica_id=self._replica_id,
            model=model,
            interval_s=interval_s,
            on_report=OccupancyMetrics().note,
        )
        self._reporter.start(self._tasks)
        changes, writer = self._host.cache_changes, LedgerWriter(url, keys)
        report = functools.partial(report_prefixes, changes, writer, self._replica_id)
        self._tasks.keep("prefix reports", report)

    async def asgi(
        self, scope: Scope, body: bytes, footprint: Footprint | None = None
    ) -> AsyncIterator[list[Message]]:
        """Answer one HTTP request; yield batches of ASGI response messages.

        Args:
            footprint: for the request router, which has chosen this replica by it.

        Raises:
            ReplicaDown: the engine had died before.
            ReplicaLost: the engine has died.
            ReplicaFault: anything else went wrong here.
        """
        if footprint is not None and footprint.holder not in (None, self._replica_id):
            scope = {**scope, HOLDER: footprint.holder}
        async with contextlib.aclosing(self._answers.answer(scope, body)) as batches:
            async for batch in batches:
                yield batch

    async def place(self, parcels: list[Any], lease: Lease) -> str:
        """Store the cache of a request from another node, before `lend` continues the request.

        Args:
            parcels: references to uint8 arrays, one for each tensor-parallel rank.

        Returns:
            The path of its files here, for `lend`.
        """
        assert self._spill is not None, "only lenders get guests"
        return await self._spill.lender.place(lease, parcels)

    async def lend(self, guest: Guest, lease: Lease) -> "AsyncGenerator[Decoded, None]":
        """Continue another replica's request; yield its decoded outputs.

        Args:
            lease: the guest's lease, for the request router, which has found this replica by it.

        Raises:
            LookupError: the lease is another replica's, because its lender is gone.
        """
        assert self._spill is not None, "only lenders get guests"
        outputs = self._spill.lender.take_in(guest)
        async with contextlib.aclosing(outputs):
            async for batch in outputs:
                yield batch

    async def give_session(
        self, ask: "SessionAsk", most_bytes_per_token: float, to: Destination, holder: Addressee
    ) -> "AsyncGenerator[Parcel | None, None]":
        """Yield the held cache for another replica's request: see `SessionTraffic.give`.

        None comes before it, as soon as this replica has a place for the call.

        Args:
            holder: this replica, for the request router, which finds it by this argument.

        Raises:
            LookupError: the addressee is gone.
        """
        sessions = self._sessions(holder)
        yield None
        yield await sessions.give(ask, most_bytes_per_token, to)

    async def take_session(self, parcel: Parcel, to: Addressee) -> bool:
        """Hold a cache of a replica that is to go; return whether it is whole.

        Raises:
            LookupError: the addressee is gone.
        """
        return await self._sessions(to).take_in(parcel)

    def _sessions(self, to: Addressee) -> SessionTraffic:
        if to.replica_id != self._replica_id:
            raise LookupError(f"replica {to.replica_id} is gone")
        assert self._spill is not None, "sessions move by spill's ways"
        if self._spill.sessions is None:
            raise LookupError("sessions are off here")
        return self._spill.sessions

    async def is_there(self) -> bool:
        """Answer a replica that calls its own deployment only to get a request router."""
        return True

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Return the load in the form that `serving.autoscaling.OccupancyPolicy` reads."""
        load = self._host.load()
        demand = ReplicaDemand(
            blocks_total=load.blocks_total,
            held_blocks=load.blocks_total - load.blocks_free,
            growth_blocks=load.blocks_reserved_growth,
            waiting_blocks=load.waiting_blocks or 0,
            prefill_tokens_queued=load.prefill_tokens_queued,
            requests=load.running + load.waiting,
            prefill_tokens_per_s=load.prefill_tokens_per_s,
            decode_tokens_per_s=load.decode_tokens_per_s,
        )
        return demand.model_dump()

    async def ping(self) -> None:
        """Return if the engine lives.

        Raises:
            ReplicaDown: it does not.
        """
        if self._host.dead:
            raise ReplicaDown("the engine process has died")

    async def check_health(self) -> None:
        self._host.check()
        self._tasks.check()

    async def __del__(self) -> None:
        if spill := getattr(self, "_spill", None):
            await spill.stop()
        if reporter := getattr(self, "_reporter", None):
            await reporter.stop()
        if tasks := getattr(self, "_tasks", None):
            await tasks.stop()
        if host := getattr(self, "_host", None):
            host.shutdown()
