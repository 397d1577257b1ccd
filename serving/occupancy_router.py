"""The request router that Ray Serve loads: occupancy first, power of two choices without it."""

import random

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from router.footprint import Footprint
from serving.routing import Routing


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
        routing = Routing.current()
        if routing is not None and pending_request is not None and candidate_replicas:
            by_id = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
            decision = routing.choose(list(by_id), _footprint(pending_request))
            if decision is not None:
                return [[by_id[replica_id]] for replica_id in decision.replica_ids]
        return [random.sample(candidate_replicas, min(2, len(candidate_replicas)))]

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: ReplicaID, result: object
    ) -> None:
        footprint = _footprint(pending_request)
        if footprint is not None and (routing := Routing.current()):
            routing.sent(replica_id.unique_id, footprint)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        if routing := Routing.current():
            routing.retain({replica.replica_id.unique_id for replica in replicas})


def _footprint(pending_request: PendingRequest) -> Footprint | None:
    """What `serving.ingress` sends along as the last argument of a request."""
    last = pending_request.args[-1] if pending_request.args else None
    return last if isinstance(last, Footprint) else None
