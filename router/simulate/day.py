"""`python -m router.simulate.day`: compare autoscaling policies over a day in virtual time.

The load follows office hours, with crowds that come within a minute. Routing, the policy's
arithmetic and the counts of blocks are the real ones; a replica takes some time to start.
"""

import argparse
import json
import math
import multiprocessing
import os
import random
import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

from adakv.progress import waiting
from adakv_serve.router.autoscaling import ReplicaDemand, ScalingTargets
from adakv_serve.router.simulate.fleet import Fleet, capacity_per_s
from adakv_serve.router.simulate.jobs import BUDGET, PROFILES
from adakv_serve.router.simulate.replica import ServiceTimes, SimulatedReplica, check_replica
from adakv_serve.router.simulate.routers import Ours
from adakv_serve.router.simulate.scaling import (
    ByQueueLength,
    FleetState,
    Oracle,
    Policy,
    by_occupancy,
    by_requests,
)
from adakv_serve.router.simulate.traces import Request, trace

# The load of each hour as a share of the busiest hour's. From 2 to 5 there is almost none.
_HOURS = (
    .2, .1, .02, 0, .02, .05, .15, .35, .65, .9, 1, .95, .8, .85, 1, 1, .95, .8, .6, .5, .45, .4,
    .35, .3,
)  # fmt: skip
# Hour at which each crowd comes, and the load that it adds. It stays for five minutes.
_CROWDS = ((9.5, 1.0), (11.2, 1.5), (15.3, 1.0), (20.6, 1.5))
_CROWD_HOURS = 1 / 12
# Share of its capacity that a replica has to do at the busiest hour.
_BUSY = 0.7
# Seconds over which a replica measures its speed.
_RATE_S = 5
# Requests that decode together in a replica that is busy.
_BATCH = 20


class Day(NamedTuple):
    """A day of a fleet, by its busiest hour.

    busiest_replicas: replicas that the busiest hour needs.
    start_s: seconds from a replica's start until it serves.
    goal_s: longest wait of a request that is within the goal, without its own prefill.
    hour_s: seconds of an hour; a shorter day has fewer requests.
    """

    times: ServiceTimes
    busiest_replicas: int
    start_s: float
    goal_s: float
    seed: int
    hour_s: float = 3600.0

    def requests(self) -> list[Request]:
        """Return the day's requests."""
        rate = self.capacity_per_s * self.busiest_replicas * _BUSY
        most = rate * (1 + max(more for _, more in _CROWDS))
        rng = random.Random(f"day/{self.seed}")
        shapes = trace("poisson", int(24 * self.hour_s * most), most, self.seed)
        return [
            request for request in shapes
            if rng.random() * most < rate * load(request.arrival_s / self.hour_s)
        ]  # fmt: skip

    @property
    def capacity_per_s(self) -> float:
        """Requests per second of one replica that is never idle."""
        return capacity_per_s(trace("poisson", 300, 1.0, seed=-1), self.times, BUDGET)


def load(hour: float) -> float:
    """Return the load at a time of the day, as a share of the busiest hour's."""
    before, share = int(hour), hour % 1
    usual = (1 - share) * _HOURS[before % 24] + share * _HOURS[(before + 1) % 24]
    crowds = sum(more for begin, more in _CROWDS if 0 <= hour - begin < _CROWD_HOURS)
    return usual + crowds


class DayResult(NamedTuple):
    """Result of a policy: what it cost, and what users got."""

    policy: str
    replica_hours: float
    in_goal: float
    p50_s: float
    p99_s: float
    most_replicas: int
    starts: int


class _Member:
    """A replica of a fleet that grows and shrinks."""

    def __init__(self, index: int, replica: SimulatedReplica, ready_s: float) -> None:
        self.index, self.replica, self.ready_s = index, replica, ready_s
        self.serves = self.leaves = False
        # Tokens computed by the end of each of the last seconds.
        self.computed: deque[tuple[int, int]] = deque([(0, 0)], maxlen=_RATE_S + 1)

    def demand(self, times: ServiceTimes) -> ReplicaDemand:
        """Return what the replica reports at the end of a second."""
        replica = self.replica
        self.computed.append((replica.prefilled_tokens, replica.decoded_tokens))
        first, last = self.computed[0], self.computed[-1]
        return ReplicaDemand.model_construct(
            blocks_total=times.blocks_total,
            held_blocks=max(0, times.blocks_total - replica.free_blocks),
            growth_blocks=replica.growth_blocks,
            waiting_blocks=replica.waiting_blocks,
            prefill_tokens_queued=replica.prefill_tokens,
            requests=replica.ongoing,
            prefill_tokens_per_s=(last[0] - first[0]) / _RATE_S,
            decode_tokens_per_s=(last[1] - first[1]) / _RATE_S,
        )


class _ElasticFleet:
    """A fleet whose replicas start, serve, and end when their last request has ended."""

    def __init__(self, day: Day) -> None:
        self._day = day
        self._replicas: list[SimulatedReplica] = []
        rng = random.Random(day.seed)
        self._router = Ours(self._replicas, rng, day.times, BUDGET)
        self._fleet = Fleet(self._router, self._replicas, late_reports=False)
        self._members: list[_Member] = []
        self._pending: list[Request] = []
        self._now_s = 0.0
        self.replica_s = 0.0
        self.starts = 0

    def arrive(self, request: Request) -> None:
        self._fleet.run_until(request.arrival_s)
        if any(member.serves for member in self._members):
            self._fleet.arrive(request, request.arrival_s)
        else:
            self._pending.append(request)

    def pass_second(self, now_s: float) -> FleetState:
        """Go on to the next full second, and return what a policy may know then."""
        self._fleet.run_until(now_s)
        self.replica_s += len(self._members) * (now_s - self._now_s)
        self._now_s = now_s
        self._members = [one for one in self._members if not (one.leaves and _is_idle(one))]
        for member in self._members:
            if not member.serves and not member.leaves and member.ready_s <= now_s:
                member.serves = True
                self._router.report(member.index, now_s)
        if any(member.serves for member in self._members):
            for request in self._pending:
                self._fleet.arrive(request, now_s)
            self._pending.clear()
        return self._state()

    def _state(self) -> FleetState:
        serving = [member for member in self._members if member.serves]
        return FleetState(
            [member.demand(self._day.times) for member in serving],
            sum(len(member.replica.waiting) for member in serving),
            len(self._pending),
            sum(not member.leaves for member in self._members),
        )

    def scale(self, wanted: int) -> None:
        """Start replicas, or have the newest ones leave, as Ray Serve chooses them."""
        staying = [member for member in self._members if not member.leaves]
        for _ in range(wanted - len(staying)):
            self.starts += 1
            index = len(self._replicas)
            replica = SimulatedReplica(f"replica-{index}", self._day.times, BUDGET)
            self._replicas.append(replica)
            self._members.append(_Member(index, replica, self._now_s + self._day.start_s))
        for member in staying[wanted:]:
            member.leaves, member.serves = True, False
            self._router.leave(member.index)

    def is_done(self) -> bool:
        return not self._pending and all(map(_is_idle, self._members))

    def waits_s(self) -> Iterator[float]:
        for replica in self._replicas:
            check_replica(replica, self._day.times.blocks_total)
            yield from replica.waits_s


def _is_idle(member: _Member) -> bool:
    return member.replica.busy_until_s is None


def run_day(name: str, policy: Policy, day: Day, requests: list[Request]) -> DayResult:
    """Run a day's requests through a fleet that a policy scales, to the end of the last."""
    fleet = _ElasticFleet(day)
    fleet.scale(1)
    arrived, second, most = 0, 0, 0
    while arrived < len(requests) or not fleet.is_done():
        second += 1
        while arrived < len(requests) and requests[arrived].arrival_s < second:
            fleet.arrive(requests[arrived])
            arrived += 1
        state = fleet.pass_second(float(second))
        fleet.scale(max(0, policy.wanted(state, float(second))))
        most = max(most, state.target)
    waits_s = sorted(fleet.waits_s())
    assert len(waits_s) == len(requests), "a request got lost"
    in_goal = sum(wait_s <= day.goal_s for wait_s in waits_s)
    return DayResult(
        name, fleet.replica_s / 3600, in_goal / len(waits_s),
        waits_s[len(waits_s) // 2], waits_s[int(0.99 * len(waits_s))], most, fleet.starts,
    )  # fmt: skip


POLICIES: dict[str, Callable[[Day, list[Request]], Policy]] = {
    # Ray Serve's defaults: two ongoing requests for each replica, 30 s and 600 s of delay.
    "serve_2": lambda day, requests: by_requests(2, up_s=30, down_s=600),
    "serve_8": lambda day, requests: by_requests(8, up_s=30, down_s=600),
    "hpa_queue_1": lambda day, requests: ByQueueLength(1),
    "hpa_queue_5": lambda day, requests: ByQueueLength(5),
    "oracle": lambda day, requests: Oracle(requests, day.capacity_per_s, day.start_s),
    "ours": lambda day, requests: by_occupancy(
        ScalingTargets(
            target_wait_s=day.goal_s,
            prefill_tokens_per_s=day.times.prefill_tokens_per_s,
            decode_tokens_per_s=day.times.decode_tokens_per_s(_BATCH),
        )
    ),
}


def _run(job: tuple[str, Day]) -> DayResult:
    name, day = job
    requests = day.requests()
    return run_day(name, POLICIES[name](day, requests), day, requests)


def line(result: DayResult) -> str:
    """Return a result as a line of text."""
    return (
        f"{result.policy:14} {result.replica_hours:7.1f} replica-hours, {result.in_goal:7.2%} "
        f"within the goal, wait p50 {result.p50_s:6.2f} p99 {result.p99_s:7.2f} s, "
        f"at most {result.most_replicas} replicas, {result.starts} starts"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m router.simulate.day", description=__doc__)
    profiles = json.loads(PROFILES.read_text())
    parser.add_argument("--profile", choices=list(profiles), default="cpu", help="service times")
    parser.add_argument("--replicas", type=int, default=8, help="that the busiest hour needs")
    parser.add_argument("--start-s", type=float, default=30.0, help="until a replica serves")
    parser.add_argument("--goal-s", type=float, default=5.0, help="longest wait, without prefill")
    parser.add_argument("--policies", nargs="+", choices=list(POLICIES), default=list(POLICIES))
    parser.add_argument("--hour-s", type=float, default=3600.0, help="seconds of an hour")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args(argv)
    times_s = (args.start_s, args.goal_s, args.hour_s)
    if args.replicas < 1 or not all(0 < one < math.inf for one in times_s):
        parser.error("replicas start at 1, and times are finite and above 0")
    times = ServiceTimes(**profiles[args.profile]["times"])
    day = Day(times, args.replicas, args.start_s, args.goal_s, args.seed, args.hour_s)
    jobs = [(name, day) for name in args.policies]
    results = []
    with (
        waiting("simulating a day", len(jobs)) as tell,
        ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool,
    ):
        for result in pool.map(_run, jobs):
            print(line(result), flush=True)
            results.append(result._asdict())
            tell(len(results), result.policy)
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
