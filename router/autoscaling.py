"""How many replicas the held and waiting caches need: the arithmetic of the autoscaling policy."""

import math
from collections.abc import Sequence
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from router.score import Speeds


class ReplicaDemand(BaseModel):
    """What one replica tells the autoscaler. Blocks are vLLM KV blocks.

    held_blocks: used, evictable prefix blocks left out. growth_blocks: what running requests will
    still take. waiting_blocks: what starting the waiting ones takes.
    """

    model_config = ConfigDict(frozen=True)

    blocks_total: float = Field(gt=0)
    held_blocks: float = Field(default=0.0, ge=0)
    growth_blocks: float = Field(default=0.0, ge=0)
    waiting_blocks: float = Field(default=0.0, ge=0)
    prefill_tokens_queued: float = Field(default=0.0, ge=0)
    requests: float = Field(default=0.0, ge=0)


class ScalingTargets(BaseModel):
    """The operator's band and wait.

    The fleet grows when its occupancy passes `high_occupancy`, to where it would be mid-band, and
    shrinks when it falls below `low_occupancy`: between the two nothing moves.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    low_occupancy: float = Field(default=0.3, ge=0.0, lt=1.0)
    high_occupancy: float = Field(default=0.8, gt=0.0, le=1.0)
    target_wait_s: float = Field(
        default=5.0, gt=0.0, description="Seconds of queued prefill that a replica may have"
    )
    prefill_tokens_per_s: float = Field(
        default=Speeds().prefill_tokens_per_s, gt=0.0, description="Of one replica"
    )
    blocks_per_request: float = Field(
        default=16.0, gt=0.0, description="Expected of a queued request while none runs"
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
    """Replicas that there should be; bounds and delays around the number are Serve's.

    Args:
        replicas: those that have reported.
        target: how many there should have been so far.
        ongoing_requests: running and queued, as Serve counts them.
        queued_requests: those that have not reached a replica yet.
    """
    if target == 0:
        # Nobody can report: any request is reason enough.
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
    if occupancy > targets.high_occupancy or for_wait > target:
        for_memory = math.ceil(demand / (each * targets.middle))
        # Twice as many at most: a burst is often over before the new ones are up.
        return max(target + 1, min(max(for_memory, for_wait), 2 * target))
    if occupancy < targets.low_occupancy:
        # The caches that a removed replica holds must find room elsewhere.
        fits = math.ceil(demand / (each * targets.middle))
        return max(1, min(target, max(fits, for_wait)))
    return target


def demand_blocks(
    replicas: Sequence[ReplicaDemand], queued_requests: float, targets: ScalingTargets
) -> float:
    """Blocks that all requests hold and will still take, those that are queued included."""
    here = sum(r.held_blocks + r.growth_blocks + r.waiting_blocks for r in replicas)
    requests = sum(r.requests for r in replicas)
    each = here / requests if requests else targets.blocks_per_request
    return here + queued_requests * each
