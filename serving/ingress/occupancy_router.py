"""The request router that Ray Serve loads: occupancy first, power of two choices without it."""

import random
from typing import TypeVar

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from router.footprint import Footprint
from router.lending.leases import Lease
from serving.ingress.routing import Routing
from serving.spill.membership import tell_membership
from serving.spill.parcels import LenderName

T = TypeVar("T")


class OccupancyRouter(RequestRouter):
    """Ranks replicas one by one by the predicted wait; never asks the store.

    Requests that carry no footprint, and all while no replica has reported, go by queue lengths to
    one of two random replicas, as with Serve's own router.
    """

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        if lease := _last_argument(pending_request, Lease):
            # A request that goes on at its lender, and nowhere else: any other replica says so at
            # once, where Serve would look for one again and again.
            wanted = LenderName.of(lease.lender).replica_id
            lender = [one for one in candidate_replicas if one.replica_id.unique_id == wanted]
            return [lender or candidate_replicas[:1]]
        routing = Routing.current()
        if routing is not None and pending_request is not None and candidate_replicas:
            by_id = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
            request_id = pending_request.metadata.internal_request_id
            footprint = _last_argument(pending_request, Footprint)
            decision = routing.choose(request_id, list(by_id), footprint)
            if decision is not None:
                return [[by_id[replica_id]] for replica_id in decision.replica_ids]
        return [random.sample(candidate_replicas, min(2, len(candidate_replicas)))]

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: ReplicaID, result: object
    ) -> None:
        footprint = _last_argument(pending_request, Footprint)
        if footprint is not None and (routing := Routing.current()):
            request_id = pending_request.metadata.internal_request_id
            routing.sent(request_id, replica_id.unique_id, footprint)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        before = {replica_id.unique_id for replica_id in self.curr_replicas}
        super().update_replicas(replicas)
        left = {replica.replica_id.unique_id for replica in replicas}
        tell_membership(before, left)
        if routing := Routing.current():
            routing.retain(left)


def _last_argument(pending_request: PendingRequest | None, kind: type[T]) -> T | None:
    """What is sent along as the last argument of a request, if it is of that kind.

    The ingress sends footprints, a replica that spills sends leases.
    """
    last = pending_request.args[-1] if pending_request and pending_request.args else None
    return last if isinstance(last, kind) else None
