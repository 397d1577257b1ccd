"""Routing in an ingress process: follows the occupancy reports and chooses replicas."""

import json
import logging
import time
import uuid
from collections import OrderedDict
from collections.abc import Collection, Sequence
from typing import NamedTuple

from ray.serve import metrics

from adakv_serve.router.chooser import Chooser, Decision
from adakv_serve.router.decision_log import DecisionLog
from adakv_serve.router.footprint import Footprint
from adakv_serve.router.ledger.occupancy import Report
from adakv_serve.router.ledger.redis_ledger import LedgerKeys
from adakv_serve.router.ledger.sendings import Sending, Sendings
from adakv_serve.router.ledger.subscription import LedgerSubscription
from adakv_serve.router.ledger.teller import Teller
from adakv_serve.router.local_view import LocalView
from adakv_serve.router.score import Speeds
from adakv_serve.serving.config import AppConfig
from adakv_serve.serving.http.tracing import note_span
from adakv_serve.serving.supervision import KeptTask, Supervisor

logger = logging.getLogger("ray.serve")

_MOST_CHOSEN = 4096


class _Chosen(NamedTuple):
    """The last decision for a request.

    began_s, took_s: by the clock of `time.monotonic`.
    """

    decision: Decision
    began_s: float
    took_s: float


class Routing:
    """A chooser of replicas with metrics, a log, and a subscription to the ledger.

    Ingresses tell each other what they have sent, so that each counts the requests and remembers
    the prefixes of all.

    decisions: counts of its decisions, and the last ones.
    ingress_id: its name for other ingresses.
    """

    def __init__(self, chooser: Chooser, *, log_decisions: bool) -> None:
        self._chooser = chooser
        self.decisions = DecisionLog()
        # The last decision for each request that no replica has taken, by request id. Clients leave
        # without a word, so the oldest decisions go.
        self._chosen: OrderedDict[str, _Chosen] = OrderedDict()
        self.ingress_id = uuid.uuid4().hex
        self._teller: Teller | None = None
        self._log_decisions = log_decisions
        self._metric = metrics.Counter(
            "adakv_routing_decisions", "Routed requests by the reason of the choice", ("reason",)
        )
        self._dropped = metrics.Gauge(
            "adakv_routing_reports_dropped", "Messages of the ledger that could not be read"
        )
        self._silent = metrics.Gauge(
            "adakv_routing_silent_replicas", "Running replicas without a fresh report"
        )
        # Replicas that requests can be routed to; others, such as lenders, report too.
        self._routable: Collection[str] = ()
        self._subscription: LedgerSubscription | None = None
        self._kept: list[KeptTask] = []

    def listen(self, url: str, keys: LedgerKeys, tasks: Supervisor) -> None:
        """Start to follow the ledger, and to tell others by it, in the running event loop."""
        self._subscription = LedgerSubscription(
            url,
            keys,
            self._chooser.view,
            on_prefixes=self._chooser.learn,
            on_sendings=self._learn,
        )
        self._teller = Teller(url, keys, self.ingress_id)
        self._kept = [
            tasks.keep("subscription", self._subscription.run),
            tasks.keep("sendings", self._teller.run),
        ]

    def _count(self, reason: str) -> None:
        self._metric.inc(tags={"reason": reason})
        self.decisions.count(reason)

    def reports(self) -> list[Report]:
        """Return the last report of each replica that this ingress has heard of."""
        return self._chooser.view.last_reports(time.monotonic())

    @property
    def has_fresh_report(self) -> bool:
        """Whether some replica that can get requests has a fresh report.

        A replica with a silent engine sends none.
        """
        silent = self._chooser.view.silent(self._routable, time.monotonic())
        return len(self._routable) > silent

    def stop(self) -> None:
        """Follow the ledger no more."""
        for task in self._kept:
            task.cancel()

    def _learn(self, sendings: Sendings) -> None:
        if sendings.ingress_id == self.ingress_id:
            return
        now_s = time.monotonic()
        for one in sendings.sent:
            footprint = Footprint(
                one.peak_blocks, one.steady_blocks, one.prompt_tokens, one.output_tokens,
                tuple(one.block_hashes), one.session,
            )  # fmt: skip
            request_id = sendings.ingress_id, one.request_id
            self._chooser.sent(request_id, one.replica_id, footprint, now_s)

    def choose(
        self, request_id: str, replica_ids: Sequence[str], footprint: Footprint | None
    ) -> Decision | None:
        """Rank the replicas for a request; None without a footprint or a report.

        Serve asks again for a request that no replica has taken.
        """
        if footprint is None:
            return None
        began_s = time.monotonic()
        decision = self._chooser.choose(request_id, replica_ids, footprint, began_s)
        self._silent.set(self._chooser.view.silent(replica_ids, began_s))
        unread = self._subscription.dropped if self._subscription is not None else 0
        self._dropped.set(self._chooser.view.dropped + unread)
        if decision is not None:
            self._chosen[request_id] = _Chosen(decision, began_s, time.monotonic() - began_s)
            self._chosen.move_to_end(request_id)
            if len(self._chosen) > _MOST_CHOSEN:
                self._chosen.popitem(last=False)
        return decision

    def sent(self, request_id: str, replica_id: str, footprint: Footprint | None) -> None:
        """Count a request that a replica got, book it there, and tell the other ingresses."""
        chosen = self._chosen.pop(request_id, None)
        if footprint is None:
            self._count("no_footprint")
            return
        if chosen is None:
            self._count("no_reports")
        else:
            self._note(chosen, footprint)
        self._chooser.sent(request_id, replica_id, footprint, time.monotonic())
        if self._teller is None:
            return
        sending = Sending(
            request_id=request_id, replica_id=replica_id, peak_blocks=footprint.peak_blocks,
            steady_blocks=footprint.steady_blocks, prompt_tokens=footprint.prompt_tokens,
            output_tokens=footprint.output_tokens, block_hashes=list(footprint.block_hashes),
            session=footprint.session,
        )  # fmt: skip
        self._teller.tell(sending)

    def _note(self, chosen: "_Chosen", footprint: Footprint) -> None:
        """Count a decision, and show it on the page, in the log and in the request's trace."""
        decision, began_s, took_s = chosen
        self._count(decision.reason)
        self.decisions.note(decision, footprint, began_s)
        if self._log_decisions:
            logger.info("routing %s", json.dumps(decision.log_line(footprint)))
        if footprint.traceparent is None:
            return
        best = decision.scores[0]
        attributes = {
            "adakv.reason": decision.reason, "adakv.replica": best.replica_id,
            "adakv.predicted_first_token_s": best.memory_s + best.prefill_s,
            "adakv.cached_tokens": best.cached_tokens,
            "adakv.prompt_tokens": footprint.prompt_tokens,
            "adakv.peak_blocks": footprint.peak_blocks,
        }  # fmt: skip
        note_span("route", {"traceparent": footprint.traceparent}, took_s, attributes)

    def answered(self, footprint: Footprint) -> None:
        """Note that a booked request has its first output: its prefill is over."""
        self._chooser.view.answered(footprint.booking)

    def ended(self, footprint: Footprint) -> None:
        """Note that a booked request has ended, before its replica reports it."""
        self._chooser.view.unbook(footprint.booking)

    def retain(self, replica_ids: Collection[str]) -> None:
        """Forget all replicas but these, which can get requests."""
        self._routable = replica_ids
        self._chooser.retain(replica_ids)


def configured_routing(config: AppConfig) -> Routing | None:
    """Return the configured routing; None for Ray Serve's own router."""
    routing = config.routing
    if routing.policy != "occupancy":
        return None
    speeds = Speeds(
        routing.prefill_tokens_per_s, routing.decode_step_s, routing.decode_step_s_per_request
    )
    view = LocalView(speeds=speeds)
    chooser = Chooser(view, speeds, config.block_size_tokens, holds_sessions=config.holds_sessions)
    return Routing(chooser, log_decisions=routing.log_decisions)
