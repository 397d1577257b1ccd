"""One cell of a comparison: a router on a trace, a load and a size of the fleet, by seed."""

from pathlib import Path
from typing import NamedTuple

from adakv_serve.router.footprint import Budget
from adakv_serve.router.simulate.fleet import simulate
from adakv_serve.router.simulate.replica import ServiceTimes
from adakv_serve.router.simulate.traces import SCENARIOS, trace

PROFILES = Path(__file__).with_name("service_times.json")
BUDGET = Budget(budget_tokens=256, keep_ratio=0.5)
# Requests for each replica, by size of the fleet: enough for a p99 in a small fleet.
_REQUESTS_PER_REPLICA = {2: 200, 8: 60, 64: 30, 256: 15}


class Cell(NamedTuple):
    """Figures of one router on one trace, load and fleet, by seed."""

    trace: str
    load_percent: int
    replicas: int
    router: str
    p50_s: list[float]
    p99_s: list[float]
    preemptions: list[int]


class Job(NamedTuple):
    trace: str
    load_percent: int
    replicas: int
    router: str
    seeds: int
    times: ServiceTimes
    capacity_per_s: float


def run_job(job: Job) -> Cell:
    count = requests_per_replica(job.replicas) * job.replicas
    rate = job.capacity_per_s * job.replicas * job.load_percent / 100
    results = [
        simulate(
            job.router,
            trace(job.trace, count, rate, seed),
            job.replicas,
            job.times,
            BUDGET,
            seed,
            SCENARIOS[job.trace],
        )
        for seed in range(job.seeds)
    ]
    return Cell(
        job.trace,
        job.load_percent,
        job.replicas,
        job.router,
        [result.wait_s(0.5) for result in results],
        [result.wait_s(0.99) for result in results],
        [result.preemptions for result in results],
    )


def requests_per_replica(replicas: int) -> int:
    return next((n for size, n in _REQUESTS_PER_REPLICA.items() if replicas <= size), 10)
