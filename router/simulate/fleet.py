"""One trace through one router: an event queue of replicas' steps, arrivals and reports."""

import heapq
import random
from collections.abc import Iterator
from typing import NamedTuple

from adakv_serve.router.footprint import Budget
from adakv_serve.router.simulate.replica import ServiceTimes, SimulatedReplica, check_replica
from adakv_serve.router.simulate.routers import Router, make_router
from adakv_serve.router.simulate.traces import SCENARIOS, Request, Scenario

# The least time between two reports of a replica, as in `serving.reporter`.
_REPORT_GAP_S = 0.1


class Result(NamedTuple):
    """Result of a run. waits_s: waits of all requests, ascending."""

    waits_s: list[float]
    preemptions: int
    elapsed_s: float

    def wait_s(self, quantile: float) -> float:
        return self.waits_s[min(len(self.waits_s) - 1, int(quantile * len(self.waits_s)))]


class _Events:
    """Queue of (time, order, kind, replica index). Arrivals come from the trace."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, str, int]] = []
        self._count = 0

    def add(self, at_s: float, what: str, index: int) -> None:
        self._count += 1
        heapq.heappush(self._heap, (at_s, self._count, what, index))

    def until(self, at_s: float) -> Iterator[tuple[float, str, int]]:
        while self._heap and self._heap[0][0] <= at_s:
            when, _, what, index = heapq.heappop(self._heap)
            yield when, what, index


class Fleet:
    """Replicas behind one router, and the events due."""

    def __init__(
        self, router: Router, replicas: list[SimulatedReplica], late_reports: bool
    ) -> None:
        self._router = router
        self._replicas = replicas
        self._late_reports = late_reports
        self._events = _Events()
        self._reported_at_s: dict[int, float] = {}
        self._report_due: set[int] = set()

    def join(self, replica: SimulatedReplica, now_s: float) -> None:
        """Add a replica, which reports at once."""
        self._replicas.append(replica)
        self._router.report(len(self._replicas) - 1, now_s)

    def run_until(self, at_s: float) -> float:
        """Run all events up to this time; return the time of the last one."""
        now_s = 0.0
        for now_s, what, index in self._events.until(at_s):
            if what == "report":
                self._report_due.discard(index)
                self._reported_at_s[index] = now_s
                self._router.report(index, now_s)
            else:
                self._replicas[index].advance(now_s)
                self._continue(index, now_s)
        return now_s

    def arrive(self, request: Request, now_s: float) -> None:
        index = self._router.choose(request, now_s)
        replica = self._replicas[index]
        idle = replica.busy_until_s is None
        replica.add(request, now_s)
        self._continue(index, now_s, step=idle)

    def _continue(self, index: int, now_s: float, *, step: bool = True) -> None:
        due_s = self._replicas[index].busy_until_s
        if step and due_s is not None:
            self._events.add(due_s, "step", index)
        if index not in self._report_due and (step or not self._late_reports):
            self._report_due.add(index)
            last_s = self._reported_at_s.get(index, float("-inf"))
            self._events.add(max(now_s, last_s + _REPORT_GAP_S), "report", index)


def simulate(
    router_name: str,
    requests: list[Request],
    replicas: int,
    times: ServiceTimes,
    budget: Budget | None,
    seed: int,
    scenario: Scenario = SCENARIOS["poisson"],
) -> Result:
    """Run all requests through a fleet, to the end of the last.

    Args:
        scenario: what the fleet is like.
    """
    every = [
        SimulatedReplica(
            f"replica-{index}", times.slower(scenario.slowdown) if index == 0 else times, budget
        )
        for index in range(replicas)
    ]
    simulated = every[:-1] if scenario.joins else list(every)
    router = make_router(router_name, simulated, random.Random(seed), times, budget)
    fleet = Fleet(router, simulated, scenario.late_reports)
    for number, request in enumerate(requests):
        fleet.run_until(request.arrival_s)
        if scenario.joins and number == len(requests) // 3:
            fleet.join(every[-1], request.arrival_s)
        fleet.arrive(request, request.arrival_s)
    elapsed_s = fleet.run_until(float("inf"))
    for replica in simulated:
        check_replica(replica, times.blocks_total)
    waits_s = sorted(wait_s for replica in simulated for wait_s in replica.waits_s)
    assert len(waits_s) == len(requests), "a request got lost"
    return Result(waits_s, sum(replica.preemptions for replica in simulated), elapsed_s)


def capacity_per_s(requests: list[Request], times: ServiceTimes, budget: Budget | None) -> float:
    """Return the requests per second of one replica when all requests arrive at once."""
    at_once = [request._replace(arrival_s=0.0) for request in requests]
    result = simulate("round_robin", at_once, 1, times, budget, seed=0)
    return len(requests) / result.elapsed_s
