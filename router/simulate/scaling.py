"""The autoscaling policies to compare, with the delays of the systems that run them."""

import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from adakv_serve.router.autoscaling import FleetSize, ReplicaDemand, ScalingTargets
from adakv_serve.router.simulate.traces import Request


class FleetState(NamedTuple):
    """What a policy may know of a fleet.

    demands: of the replicas that serve.
    waiting: requests that wait in replicas.
    queued: requests that no replica has yet.
    target: replicas that serve or start.
    """

    demands: list[ReplicaDemand]
    waiting: int
    queued: int
    target: int

    @property
    def ongoing(self) -> float:
        return self.queued + sum(demand.requests for demand in self.demands)


class Policy(Protocol):
    def wanted(self, state: FleetState, now_s: float) -> int:
        """Return the replicas that are to serve. It is called once a second."""
        ...


class Delayed:
    """Ray Serve's delays: a decision counts when it has had the same direction for so long."""

    def __init__(
        self, decide: Callable[[FleetState, float], int], up_s: float, down_s: float
    ) -> None:
        self._decide, self._up_s, self._down_s = decide, up_s, down_s
        self._direction, self._since_s = 0, 0.0

    def wanted(self, state: FleetState, now_s: float) -> int:
        wanted = self._decide(state, now_s)
        direction = (wanted > state.target) - (wanted < state.target)
        if direction != self._direction:
            self._direction, self._since_s = direction, now_s
        delay_s = self._up_s if direction > 0 else self._down_s
        return wanted if direction and now_s - self._since_s >= delay_s else state.target


def by_occupancy(targets: ScalingTargets) -> Policy:
    """Return our policy with the delays of `configs/autoscale.yaml`."""
    size = FleetSize(targets)

    def decide(state: FleetState, now_s: float) -> int:
        return size.wanted(state.demands, state.target, state.ongoing, float(state.queued), now_s)

    return Delayed(decide, up_s=2.0, down_s=20.0)


def by_requests(target: float, up_s: float, down_s: float, look_back_s: int = 30) -> Policy:
    """Return Ray Serve's own policy: so many ongoing requests for each replica."""
    recent: deque[float] = deque(maxlen=look_back_s)

    def decide(state: FleetState, now_s: float) -> int:
        recent.append(state.ongoing)
        if state.target == 0:
            return 1 if state.ongoing else 0
        return math.ceil(sum(recent) / len(recent) / target)

    return Delayed(decide, up_s, down_s)


class ByQueueLength:
    """Kubernetes' autoscaler on the mean number of waiting requests, with its defaults.

    It looks every 15 s, ignores deviations of 10 %, shrinks to the most that it has wanted in five
    minutes, and grows by four or twofold.
    """

    def __init__(self, target: float) -> None:
        self._target = target
        self._recent: deque[int] = deque(maxlen=300 // 15)

    def wanted(self, state: FleetState, now_s: float) -> int:
        if now_s % 15:
            return state.target
        # Replicas that start count as ones without a queue.
        wanted = math.ceil((state.waiting + state.queued) / self._target)
        if abs(wanted - state.target) <= 0.1 * state.target:
            wanted = state.target
        self._recent.append(max(1, wanted))
        if wanted >= state.target:
            return min(wanted, max(2 * state.target, state.target + 4))
        return min(state.target, max(self._recent))


class Oracle:
    """Knows what will arrive, and has each replica ready when it is needed."""

    def __init__(
        self, requests: Sequence[Request], capacity_per_s: float, start_s: float, load: float = 0.85
    ) -> None:
        self._minutes = [0] * (int(requests[-1].arrival_s // 60) + 1)
        for request in requests:
            self._minutes[int(request.arrival_s // 60)] += 1
        self._per_replica = 60 * load * capacity_per_s
        self._ahead = 1 + math.ceil(start_s / 60)

    def wanted(self, state: FleetState, now_s: float) -> int:
        minute = int(now_s // 60)
        # A request takes some time, so the last minute's count as well.
        near = self._minutes[max(0, minute - 1) : minute + 1 + self._ahead]
        needed = math.ceil(max(near, default=0) / self._per_replica)
        return max(needed, 1 if state.ongoing else 0)
