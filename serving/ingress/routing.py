"""Routing in an ingress process: follows the occupancy reports and chooses replicas."""

import asyncio
import json
import logging
import time
from collections.abc import Collection, Sequence

from ray.serve import metrics

from router.chooser import Chooser, Decision
from router.footprint import Footprint
from router.ledger.redis_ledger import LedgerKeys
from router.ledger.subscription import LedgerSubscription
from router.local_view import LocalView
from router.score import Speeds
from serving.config import AppConfig

logger = logging.getLogger("ray.serve")


class Routing:
    """A chooser of replicas with metrics, a log, and a subscription to the ledger."""

    def __init__(self, chooser: Chooser, *, log_decisions: bool) -> None:
        self._chooser = chooser
        self._log_decisions = log_decisions
        self._decisions = metrics.Counter(
            "adakv_routing_decisions", "Routed requests by the reason of the choice", ("reason",)
        )
        self._dropped = metrics.Gauge(
            "adakv_routing_reports_dropped", "Occupancy reports that could not be read"
        )
        self._task: asyncio.Task[None] | None = None

    def listen(self, url: str, keys: LedgerKeys) -> None:
        """Start to follow the ledger, in the running event loop."""
        subscription = LedgerSubscription(
            url, keys, self._chooser.view, on_prefixes=self._chooser.learn
        )
        self._task = asyncio.get_running_loop().create_task(subscription.run())

    def choose(
        self, request_id: str, replica_ids: Sequence[str], footprint: Footprint | None
    ) -> Decision | None:
        """Rank the replicas for a request; None without a footprint or a report. Counts each."""
        if footprint is None:
            self._decisions.inc(tags={"reason": "no_footprint"})
            return None
        decision = self._chooser.choose(request_id, replica_ids, footprint, time.monotonic())
        self._decisions.inc(tags={"reason": decision.reason if decision else "no_reports"})
        self._dropped.set(self._chooser.view.dropped)
        if decision and self._log_decisions:
            logger.info("routing %s", json.dumps(decision.log_line(footprint)))
        return decision

    def sent(self, request_id: str, replica_id: str, footprint: Footprint) -> None:
        """Book a request on the replica that got it."""
        self._chooser.sent(request_id, replica_id, footprint, time.monotonic())

    def retain(self, replica_ids: Collection[str]) -> None:
        """Forget all replicas but these."""
        self._chooser.retain(replica_ids)


def configured_routing(config: AppConfig) -> Routing | None:
    """Return the configured routing; None for Ray Serve's own router."""
    routing = config.routing
    if routing.policy != "occupancy":
        return None
    speeds = Speeds(
        routing.prefill_tokens_per_s, routing.decode_step_s, routing.decode_step_s_per_request
    )
    view = LocalView(prefill_tokens_per_s=speeds.prefill_tokens_per_s)
    chooser = Chooser(view, speeds, config.block_size_tokens)
    return Routing(chooser, log_decisions=routing.log_decisions)
