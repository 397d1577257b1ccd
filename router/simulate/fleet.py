"""Runs one trace through one router: an event queue over replicas, arrivals and reports."""

import heapq
import random
from collections.abc import Iterator
from typing import NamedTuple

from router.footprint import Budget
from router.simulate.replica import ServiceTimes, SimulatedReplica, check_replica
from router.simulate.routers import make_router
from router.simulate.traces import Request

# As the replicas' own reporter: a report follows a change, with this gap at least.
_REPORT_GAP_S = 0.1


class Result(NamedTuple):
    """waits_s: of all requests, ascending."""

    waits_s: list[float]
    preemptions: int
    elapsed_s: float

    def wait_s(self, quantile: float) -> float:
        return self.waits_s[min(len(self.waits_s) - 1, int(quantile * len(self.waits_s)))]


class _Events:
    """(when, order, what, replica index); arrivals come from the trace itself."""

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


def simulate(
    router_name: str,
    requests: list[Request],
    replicas: int,
    times: ServiceTimes,
    budget: Budget | None,
    seed: int,
) -> Result:
    """All requests through a fleet, to the end of the last."""
    fleet = [SimulatedReplica(f"replica-{index}", times, budget) for index in range(replicas)]
    router = make_router(router_name, fleet, random.Random(seed), times, budget)
    events = _Events()
    reported_at = [float("-inf")] * replicas
    report_due = [False] * replicas

    def changed(index: int, now_s: float) -> None:
        if not report_due[index]:
            report_due[index] = True
            events.add(max(now_s, reported_at[index] + _REPORT_GAP_S), "report", index)

    def run_until(at_s: float) -> float:
        now_s = 0.0
        for when, what, index in events.until(at_s):
            now_s = when
            if what == "report":
                report_due[index] = False
                reported_at[index] = now_s
                router.report(index, now_s)
                continue
            replica = fleet[index]
            replica.advance(now_s)
            if replica.busy_until_s is not None:
                events.add(replica.busy_until_s, "step", index)
            changed(index, now_s)
        return now_s

    for request in requests:
        run_until(request.arrival_s)
        index = router.choose(request, request.arrival_s)
        idle = fleet[index].busy_until_s is None
        fleet[index].add(request, request.arrival_s)
        if idle and (due := fleet[index].busy_until_s) is not None:
            events.add(due, "step", index)
        changed(index, request.arrival_s)
    elapsed_s = run_until(float("inf"))
    for replica in fleet:
        check_replica(replica, times.blocks_total)
    outcomes = [outcome for replica in fleet for outcome in replica.outcomes]
    assert len(outcomes) == len(requests), "a request got lost"
    return Result(
        sorted(outcome.wait_s for outcome in outcomes),
        sum(replica.preemptions for replica in fleet),
        elapsed_s,
    )


def capacity_per_s(requests: list[Request], times: ServiceTimes, budget: Budget | None) -> float:
    """Requests per second that one replica finishes when all of them wait for it."""
    at_once = [request._replace(arrival_s=0.0) for request in requests]
    result = simulate("round_robin", at_once, 1, times, budget, seed=0)
    return len(requests) / result.elapsed_s
