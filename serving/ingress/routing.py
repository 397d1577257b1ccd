"""Routing state of an ingress process: what it knows of the replicas, and what it decides."""

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
    """One per ingress process; the request router that Ray creates there finds it by `current`."""

    _current: "Routing | None" = None

    def __init__(self, speeds: Speeds, block_size_tokens: int, *, log_decisions: bool) -> None:
        self._chooser = Chooser(
            LocalView(prefill_tokens_per_s=speeds.prefill_tokens_per_s), speeds, block_size_tokens
        )
        self._log_decisions = log_decisions
        self._decisions = metrics.Counter(
            "adakv_routing_decisions", "Routed requests by the reason of the choice", ("reason",)
        )
        self._dropped = metrics.Gauge(
            "adakv_routing_reports_dropped", "Occupancy reports that could not be read"
        )
        self._task: asyncio.Task[None] | None = None
        Routing._current = self

    @classmethod
    def current(cls) -> "Routing | None":
        """This process's; None where there is no ingress."""
        return cls._current

    def listen(self, url: str, keys: LedgerKeys) -> None:
        """Follows the ledger from now on, in the running event loop."""
        subscription = LedgerSubscription(
            url, keys, self._chooser.view, on_prefixes=self._chooser.learn
        )
        self._task = asyncio.get_running_loop().create_task(subscription.run())

    def choose(
        self, request_id: str, replica_ids: Sequence[str], footprint: Footprint | None
    ) -> Decision | None:
        """None where there is nothing to decide by; counted all the same."""
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
        self._chooser.sent(request_id, replica_id, footprint, time.monotonic())

    def retain(self, replica_ids: Collection[str]) -> None:
        """Forgets all replicas but these."""
        self._chooser.retain(replica_ids)


def start_routing(config: AppConfig) -> Routing | None:
    """This process's routing as configured; None for Ray Serve's own."""
    routing = config.routing
    if routing.policy != "occupancy":
        return None
    speeds = Speeds(
        routing.prefill_tokens_per_s, routing.decode_step_s, routing.decode_step_s_per_request
    )
    return Routing(speeds, config.block_size_tokens, log_decisions=routing.log_decisions)
