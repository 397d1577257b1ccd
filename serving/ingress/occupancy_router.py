"""The request router: by occupancy if known, else power of two choices."""

import logging
import random
from typing import ClassVar, TypeVar

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from adakv_serve.router.chooser import Decision
from adakv_serve.router.footprint import Footprint
from adakv_serve.router.lending.leases import Lease
from adakv_serve.serving.ingress.routing import Routing
from adakv_serve.serving.spill.membership import Membership
from adakv_serve.serving.spill.parcels import LenderName
from adakv_serve.serving.spill.peers import Addressee

logger = logging.getLogger("ray.serve")

T = TypeVar("T")


class OccupancyRouter(RequestRouter):
    """Ranks replicas by the predicted wait, from the reports that the ingress follows.

    Requests without a footprint, and all requests before the first report, go to one of two random
    replicas by queue length, as with Serve's own router.
    """

    # Set by the ingress of this process; None in a process without one. It is a class attribute
    # because Serve creates the routers itself, as instances of `ServedRouter`.
    routing: ClassVar[Routing | None] = None
    # Replicas that this process could send requests to; None in a process without such a router.
    replica_count: ClassVar[int | None] = None
    # Set by a replica of this process that spills.
    membership: ClassVar[Membership | None] = None

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        if (wanted := _addressee(pending_request)) is not None:
            # If it is gone, any other replica refuses at once; with no candidates Serve would retry
            # for ever.
            named = [one for one in candidate_replicas if one.replica_id.unique_id == wanted]
            return [named or candidate_replicas[:1]]
        routing = self.routing
        if routing is not None and pending_request is not None and candidate_replicas:
            by_id = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
            footprint = _last_argument(pending_request, Footprint)
            request_id = _booking(pending_request, footprint)
            decision = self._decided(routing, request_id, list(by_id), footprint)
            if decision is not None and footprint is not None:
                # Where it goes elsewhere all the same, its held cache may follow.
                pending_request.args[-1] = footprint._replace(holder=decision.holder)
                return [[by_id[replica_id]] for replica_id in decision.replica_ids]
        return [random.sample(candidate_replicas, min(2, len(candidate_replicas)))]

    def _decided(
        self,
        routing: Routing,
        request_id: str,
        replica_ids: list[str],
        footprint: Footprint | None,
    ) -> Decision | None:
        try:
            return routing.choose(request_id, replica_ids, footprint)
        except Exception:
            # Serve has taken the request off its queue: it would never be answered.
            logger.exception("no replica could be chosen by its occupancy")
            return None

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: ReplicaID, result: object
    ) -> None:
        footprint = _last_argument(pending_request, Footprint)
        if self.routing is None or _addressee(pending_request) is not None:
            return
        request_id = _booking(pending_request, footprint)
        try:
            self.routing.sent(request_id, replica_id.unique_id, footprint)
        except Exception:
            # A replica has the request: its client would get an error all the same.
            logger.exception("request %s could not be booked", request_id)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        before = {replica_id.unique_id for replica_id in self.curr_replicas}
        super().update_replicas(replicas)
        left = {replica.replica_id.unique_id for replica in replicas}
        OccupancyRouter.replica_count = len(left)
        if self.membership is not None:
            self.membership.update(before, left)
        if self.routing is not None:
            self.routing.retain(left)


def _booking(pending_request: PendingRequest, footprint: Footprint | None) -> str:
    """Return the name by which a request is booked."""
    named = footprint.booking if footprint is not None else None
    return named or str(pending_request.metadata.internal_request_id)


def _addressee(pending_request: PendingRequest | None) -> str | None:
    """Return the only replica that a call between replicas is for, or None."""
    if lease := _last_argument(pending_request, Lease):
        # A moved request continues only at its lender.
        return LenderName.of(lease.lender).replica_id
    to = _last_argument(pending_request, Addressee)
    return to.replica_id if to is not None else None


def _last_argument(pending_request: PendingRequest | None, kind: type[T]) -> T | None:
    """Return the last argument of a request if it is of that kind.

    The ingress appends footprints, a borrower leases, and replicas that move sessions addressees.
    """
    last = pending_request.args[-1] if pending_request and pending_request.args else None
    return last if isinstance(last, kind) else None
