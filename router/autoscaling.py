"""The arithmetic of the autoscaling policy: the replicas that held and waiting caches need."""

import math
from collections.abc import Sequence
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from router.score import Speeds


class ReplicaDemand(BaseModel):
    """Demand of one replica. Blocks are vLLM KV blocks.

    held_blocks: used blocks without evictable prefix blocks.
    growth_blocks: blocks that running requests will still take.
    waiting_blocks: blocks that waiting requests need to start.
    """

    model_config = ConfigDict(frozen=True)

    blocks_total: float = Field(gt=0)
    held_blocks: float = Field(default=0.0, ge=0)
    growth_blocks: float = Field(default=0.0, ge=0)
    waiting_blocks: float = Field(default=0.0, ge=0)
    prefill_tokens_queued: float = Field(default=0.0, ge=0)
    requests: float = Field(default=0.0, ge=0)


class ScalingTargets(BaseModel):
    """Band of occupancy and longest wait, as the operator sets them.

    The fleet grows when its occupancy passes `high_occupancy` and shrinks when it falls below
    `low_occupancy`, in both cases to the middle of the band.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    low_occupancy: float = Field(default=0.3, ge=0.0, lt=1.0)
    high_occupancy: float = Field(default=0.8, gt=0.0, le=1.0)
    target_wait_s: float = Field(
        default=5.0, gt=0.0, description="Most seconds of queued prefill on a replica"
    )
    prefill_tokens_per_s: float = Field(
        default=Speeds().prefill_tokens_per_s, gt=0.0, description="Speed of one replica"
    )
    blocks_per_request: float = Field(
        default=16.0, gt=0.0, description="Blocks of a queued request while none runs"
    )

    @model_validator(mode="after")
    def _band(self) -> Self:
        if self.low_occupancy >= self.high_occupancy:
            raise ValueError(
                f"low_occupancy={self.low_occupancy} must lie below "
                f"high_occupancy={self.high_occupancy}"
            )
        return self

    @property
    def middle(self) -> float:
        return (self.low_occupancy + self.high_occupancy) / 2


def desired_replicas(
    replicas: Sequence[ReplicaDemand],
    target: int,
    ongoing_requests: float,
    queued_requests: float,
    targets: ScalingTargets,
) -> int:
    """Return the number of replicas that the demand needs. Serve adds bounds and delays.

    Args:
        replicas: demand of those that have reported.
        target: current target of Serve.
        ongoing_requests: running and queued requests, as Serve counts them.
        queued_requests: requests that have reached no replica yet.
    """
    if target == 0:
        # Without a replica there are no reports.
        return 1 if ongoing_requests > 0 else 0
    if not replicas:
        return target
    if ongoing_requests == 0 and not any(r.held_blocks + r.waiting_blocks for r in replicas):
        return 0
    each = sum(r.blocks_total for r in replicas) / len(replicas)
    demand = demand_blocks(replicas, queued_requests, targets)
    occupancy = demand / (each * target)
    backlog_s = sum(r.prefill_tokens_queued for r in replicas) / targets.prefill_tokens_per_s
    for_wait = math.ceil(backlog_s / targets.target_wait_s)
    wanted = max(for_wait, math.ceil(demand / (each * targets.middle)))
    if occupancy > targets.high_occupancy or for_wait > target:
        # A burst is often over before new replicas have started.
        return max(target + 1, min(wanted, 2 * target))
    if occupancy < targets.low_occupancy:
        # The caches of a removed replica must fit into the others.
        return max(1, min(target, wanted))
    return target


def demand_blocks(
    replicas: Sequence[ReplicaDemand], queued_requests: float, targets: ScalingTargets
) -> float:
    """Return the blocks that all requests hold or will take, queued ones included."""
    here = sum(r.held_blocks + r.growth_blocks + r.waiting_blocks for r in replicas)
    requests = sum(r.requests for r in replicas)
    each = here / requests if requests else targets.blocks_per_request
    return here + queued_requests * each
