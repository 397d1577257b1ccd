"""The arithmetic of the autoscaling policy: the replicas that caches, work and waits need."""

import math
from collections import deque
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, Field

from adakv_serve.router.score import Speeds

# Seconds over which demand is averaged.
_AVERAGE_S = 20.0


class ReplicaDemand(BaseModel):
    """Demand of one replica. Blocks are vLLM KV blocks.

    held_blocks: used blocks without evictable prefix blocks.
    growth_blocks: blocks that running requests will still take.
    waiting_blocks: blocks that waiting requests need to start.
    prefill_tokens_per_s, decode_tokens_per_s: tokens computed per second, of late.
    """

    model_config = ConfigDict(frozen=True)

    blocks_total: float = Field(gt=0)
    held_blocks: float = Field(default=0.0, ge=0)
    growth_blocks: float = Field(default=0.0, ge=0)
    waiting_blocks: float = Field(default=0.0, ge=0)
    prefill_tokens_queued: float = Field(default=0.0, ge=0)
    requests: float = Field(default=0.0, ge=0)
    prefill_tokens_per_s: float = Field(default=0.0, ge=0)
    decode_tokens_per_s: float = Field(default=0.0, ge=0)


class ScalingTargets(BaseModel):
    """What the operator wants of a fleet."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    target_occupancy: float = Field(
        default=0.8, gt=0.0, le=1.0, description="Share of the blocks, and of the time, in use"
    )
    target_wait_s: float = Field(
        default=5.0, gt=0.0, description="Longest predicted wait of a request that comes now"
    )
    keep_s: float = Field(
        default=300.0,
        ge=0.0,
        description="The fleet keeps the largest size that it needed in these seconds",
    )
    prefill_tokens_per_s: float = Field(
        default=Speeds().prefill_tokens_per_s, gt=0.0, description="Speed of one replica"
    )
    decode_tokens_per_s: float | None = Field(
        default=None,
        gt=0.0,
        description="Speed of one replica in a full batch; without it work does not count",
    )
    blocks_per_request: float = Field(
        default=16.0, gt=0.0, description="Blocks of a queued request while none runs"
    )


class FleetSize:
    """The number of replicas that a fleet needs, from what they report time after time."""

    def __init__(self, targets: ScalingTargets) -> None:
        self._targets = targets
        # Time and demand, in replicas, of the last looks.
        self._demands: deque[tuple[float, float]] = deque()
        # Time and size of those looks after which no larger size was needed: the largest is first.
        self._sizes: deque[tuple[float, int]] = deque()

    def wanted(
        self,
        replicas: Sequence[ReplicaDemand],
        target: int,
        ongoing_requests: float,
        queued_requests: float,
        now_s: float,
    ) -> int:
        """Return the replicas that are to serve, at most twice as many as now.

        Serve adds bounds and delays.

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
        needed = self._needed(replicas, ongoing_requests, queued_requests, now_s)
        if not self._sizes:
            # Serve makes its policies anew with its controller: the fleet had its reasons.
            self._sizes.append((now_s, target))
        while self._sizes and self._sizes[-1][1] <= needed:
            self._sizes.pop()
        self._sizes.append((now_s, needed))
        _forget(self._sizes, now_s - self._targets.keep_s)
        if needed > target:
            # A burst is often over before new replicas have started.
            return min(needed, 2 * target)
        return min(target, self._sizes[0][1])

    def _needed(
        self,
        replicas: Sequence[ReplicaDemand],
        ongoing_requests: float,
        queued_requests: float,
        now_s: float,
    ) -> int:
        targets = self._targets
        each = sum(r.blocks_total for r in replicas) / len(replicas)
        full = demand_blocks(replicas, queued_requests, targets) / each
        # More than there is room for waits, whatever the average is.
        waits = max(0.0, full - len(replicas))
        busy = work(replicas, targets)
        self._demands.append((now_s, max(full, busy)))
        _forget(self._demands, now_s - _AVERAGE_S)
        demand = sum(one for _, one in self._demands) / len(self._demands)
        needed = _whole(max(demand, waits and full) / targets.target_occupancy)
        backlog_s = backlog_tokens(replicas, queued_requests) / targets.prefill_tokens_per_s
        if backlog_s / len(replicas) > targets.target_wait_s:
            to_wait = busy / targets.target_occupancy + backlog_s / targets.target_wait_s
            needed = max(needed, _whole(to_wait))
        is_idle = ongoing_requests == 0 and not any(
            r.held_blocks + r.waiting_blocks for r in replicas
        )
        return needed if is_idle else max(1, needed)


def _whole(replicas: float) -> int:
    """Round up, but not for a rounding error."""
    return math.ceil(replicas - 1e-6)


def _forget(
    recent: "deque[tuple[float, float]] | deque[tuple[float, int]]", before_s: float
) -> None:
    while recent[0][0] < before_s:
        recent.popleft()


def work(replicas: Sequence[ReplicaDemand], targets: ScalingTargets) -> float:
    """Return how many replicas would compute all the time to do what was done of late."""
    decode_tokens_per_s = targets.decode_tokens_per_s
    if decode_tokens_per_s is None:
        return 0.0
    return sum(
        r.prefill_tokens_per_s / targets.prefill_tokens_per_s
        + r.decode_tokens_per_s / decode_tokens_per_s
        for r in replicas
    )


def demand_blocks(
    replicas: Sequence[ReplicaDemand], queued_requests: float, targets: ScalingTargets
) -> float:
    """Return the blocks that all requests hold or will take, queued ones included."""
    here = sum(r.held_blocks + r.growth_blocks + r.waiting_blocks for r in replicas)
    requests = sum(r.requests for r in replicas)
    each = here / requests if requests else targets.blocks_per_request
    return here + queued_requests * each


def backlog_tokens(replicas: Sequence[ReplicaDemand], queued_requests: float) -> float:
    """Return the prompt tokens for which requests wait, queued requests' included.

    Nobody waits for the prompt of a request that is alone on its replica.
    """
    here = sum(r.prefill_tokens_queued for r in replicas)
    requests = sum(r.requests for r in replicas)
    queued = queued_requests * here / requests if requests else 0.0
    return queued + sum(r.prefill_tokens_queued for r in replicas if r.requests > 1)
