"""Lender, borrower and load of one replica inside Ray Serve."""

import asyncio
import logging
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle

from adakv_serve.router.ledger.redis_ledger import LedgerKeys
from adakv_serve.router.lending.redis_leases import LendingLedger
from adakv_serve.router.lending.spill_plan import SpillLimits
from adakv_serve.serving.config import AppConfig
from adakv_serve.serving.janitor import remove_orphans
from adakv_serve.serving.spill.borrower import Borrower
from adakv_serve.serving.spill.lender import Lender
from adakv_serve.serving.spill.membership import Membership
from adakv_serve.serving.spill.metrics import SessionMetrics, SpillMetrics
from adakv_serve.serving.spill.move import MoveReport, Send, SpillSettings
from adakv_serve.serving.spill.parcels import Guest, LenderName, open_parcels
from adakv_serve.serving.spill.peers import ReplicaPeers
from adakv_serve.serving.spill.sessions import MoveSpeed, SessionTraffic
from adakv_serve.serving.supervision import KeptTask, Supervisor

logger = logging.getLogger("ray.serve")

if TYPE_CHECKING:
    from adakv_serve.serving.vllm_engine.host import VllmHost
    from adakv_serve.serving.vllm_engine.load import EngineLoad
    from adakv_worker.frontend.moving import Decoded


class ReplicaSpill:
    """Lends and borrows for one replica, and adds lent and borrowed blocks to its host's load."""

    def __init__(
        self,
        host: "VllmHost",
        config: AppConfig,
        url: str,
        keys: LedgerKeys,
        name: LenderName,
        lenders: DeploymentHandle[Any] | None,
        tasks: Supervisor,
    ) -> None:
        """
        Args:
            name: the replica's name in the ledger of lent memory.
            lenders: deployment of the replicas that only lend.
            tasks: runs its background tasks.
        """
        self._host = host
        self._name = name
        self._application = keys.application
        # For the request routers of this process, which inform it.
        self.membership = Membership(name.replica_id)
        self._tasks = tasks
        self._watch: KeptTask | None = None
        self._metrics = SpillMetrics()
        self._moves = self._failed_moves = 0
        self._ledger = LendingLedger(url, keys)
        self._folder = Path(config.spill.folder)
        self.lender = self._make_lender(config)
        self.sessions = self._make_sessions(config, keys.application)
        send = _sender(name, keys.application, lenders)
        self._borrower = Borrower(
            core=host.core,
            load=host.load,
            ledger=self._ledger,
            replica_id=str(name),
            cache_kind=host.cache_kind,
            send=send,
            block_bytes=host.block_bytes,
            settings=_settings(config),
            tasks=tasks,
            on_move=self._note_move,
        )

    def _make_lender(self, config: AppConfig) -> Lender:
        host, spill = self._host, config.spill
        return Lender(
            core=host.core,
            load=host.load,
            ledger=self._ledger,
            replica_id=str(self._name),
            cache_kind=host.cache_kind,
            share=spill.lend_share,
            folder=self._folder,
            park_bytes=spill.park_bytes,
            max_requests=min(host.max_running, config.max_ongoing_requests),
            silent=lambda: host.silent,
        )

    def _note_move(self, report: MoveReport) -> None:
        self._metrics.note(report)
        if report.problem is None:
            self._moves += 1
        else:
            self._failed_moves += 1

    def _make_sessions(self, config: AppConfig, application: str) -> SessionTraffic | None:
        """Return the traffic of held caches; None where requests leave none, or none may come."""
        sessions = config.compression.sessions if config.compression is not None else None
        if sessions is None or not sessions.enabled or not sessions.arrival_bytes:
            return None
        peers = ReplicaPeers(self._name, application, self._ledger, self._host.cache_kind)
        traffic = SessionTraffic(
            core=self._host.sessions,
            peers=peers,
            pack=peers.pack,
            node_id=self._name.node_id,
            cache_kind=self._host.cache_kind,
            folder=self._folder,
            prefill_tokens_per_s=config.routing.prefill_tokens_per_s,
            speed=MoveSpeed(config.spill.bytes_per_s),
            interval_s=config.spill.interval_s,
            tasks=self._tasks,
            on_move=SessionMetrics().note,
        )
        self._host.sessions.fetch_by(traffic.fetch)
        return traffic

    def start(self) -> None:
        remove_orphans(self._folder)
        self.lender.start(self._tasks)
        self._borrower.start()
        self._watch = self._tasks.keep("membership", self._watch_membership)

    async def _watch_membership(self) -> None:
        # The first call creates the router, whichever replica answers it.
        own = serve.get_deployment_handle(self._name.deployment, self._application)
        try:
            await own.options(method_name="is_there").remote()
        except Exception as error:
            logger.info("no answer from a replica of this deployment: %s", error)
        await self.membership.follow(self._follow_membership)

    async def _follow_membership(self, is_there: bool) -> None:
        self._borrower.drain(not is_there)
        if self.sessions is not None:
            self.sessions.drain(not is_there)
        if is_there:
            logger.info("this replica gets requests again")
            self.lender.start(self._tasks)
        else:
            logger.info("this replica gets no more requests: its compressed ones leave")
            await self.lender.stop()

    async def stop(self) -> None:
        if self._watch is not None:
            await self._watch.stop()
        await self._borrower.stop()
        if self.sessions is not None:
            await self.sessions.stop()
        await self.lender.stop()
        await self._ledger.close()

    def load(self) -> "EngineLoad":
        return self._host.load()._replace(
            blocks_lent=self.lender.lent_blocks,
            blocks_borrowed=self._borrower.borrowed_blocks,
            moves=self._moves,
            failed_moves=self._failed_moves,
        )

    @property
    def silent(self) -> bool:
        return self._host.silent

    @property
    def changed(self) -> asyncio.Event:
        return self._host.changed


def _settings(config: AppConfig) -> SpillSettings:
    spill = config.spill
    limits = SpillLimits(
        moves_of_a_request=spill.moves_per_request,
        rest_s=spill.rest_s,
        moves_at_once=spill.moves_at_once,
        worth=spill.worth,
        spare_blocks=spill.spare_blocks,
    )
    return SpillSettings(
        limits=limits,
        interval_s=spill.interval_s,
        expected_tokens=spill.expected_tokens,
        prefill_tokens_per_s=config.routing.prefill_tokens_per_s,
        first_output_s=spill.first_output_s,
        parked_s=spill.parked_s,
        bytes_per_s=spill.bytes_per_s,
        folder=Path(spill.folder),
    )


def _put(path: str) -> list[ray.ObjectRef[Any]]:
    return [ray.put(parcel) for parcel in open_parcels(Path(path))]


def _sender(name: LenderName, application: str, lenders: DeploymentHandle[Any] | None) -> Send:
    """Return a function that sends requests to lenders, whom the router finds by the lease."""
    handles: dict[str, Any] = {}

    def handle_of(deployment: str) -> Any:
        if deployment not in handles:
            handle = lenders
            if lenders is None or deployment == name.deployment:
                handle = serve.get_deployment_handle(deployment, application)
            assert handle is not None
            handles[deployment] = handle
        return handles[deployment]

    async def send(guest: Guest) -> "AsyncGenerator[Decoded, None]":
        lender = LenderName.of(guest.lease.lender)
        handle = handle_of(lender.deployment)
        if lender.node_id != name.node_id:
            parcels = await asyncio.to_thread(_put, guest.path)
            placing = handle.options(method_name="place")
            guest = guest._replace(path=await placing.remote(parcels, guest.lease))
            # This frame lasts as long as the request; its cache in the object store must not.
            del parcels
        outputs = handle.options(stream=True, method_name="lend").remote(guest, guest.lease)
        try:
            async for batch in outputs:
                yield batch
        finally:
            outputs.cancel()

    return send
