"""`python -m router.simulate`: compare routers over a fleet in virtual time.

Chooser, view and bookings are the real ones. Replicas count blocks with the real arithmetic, and
their service times come from a live run. All routers get the same requests, seed by seed.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from adakv.progress import waiting
from adakv_serve.router.simulate.fleet import capacity_per_s
from adakv_serve.router.simulate.jobs import BUDGET, PROFILES, Cell, Job, run_job
from adakv_serve.router.simulate.replica import ServiceTimes
from adakv_serve.router.simulate.routers import ROUTERS
from adakv_serve.router.simulate.traces import SCENARIOS, trace

# Two-sided 95 % points of Student's t for 1 to 9 degrees of freedom.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def run(
    traces: Sequence[str],
    loads: Sequence[int],
    sizes: Sequence[int],
    seeds: int,
    times: ServiceTimes,
) -> list[Cell]:
    capacities = {
        name: capacity_per_s(trace(name, 300, 1.0, seed=-1), times, BUDGET) for name in traces
    }
    jobs = [
        Job(name, load, size, router, seeds, times, capacities[name])
        for size in sizes
        for name in traces
        for load in loads
        for router in ROUTERS
    ]
    # Dynamo's threads do not survive a fork.
    cells = []
    with (
        waiting("simulating", len(jobs)) as tell,
        ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool,
    ):
        for cell in pool.map(run_job, jobs):
            cells.append(cell)
            tell(len(cells), f"{cell.trace}@{cell.load_percent}, {cell.replicas} replicas")
            if cell.router == ROUTERS[-1]:
                print(table(cells[-len(ROUTERS) :]), flush=True)
    return cells


def table(cells: Sequence[Cell]) -> str:
    """Return the routers of one trace, load and fleet as lines."""
    first = cells[0]
    lines = [f"{first.trace}@{first.load_percent}, {first.replicas} replicas"]
    lines += [
        f"  {cell.router:16} wait p50 {_mean(cell.p50_s)} p99 {_mean(cell.p99_s)} s, "
        f"preemptions {statistics.mean(cell.preemptions):.1f}"
        for cell in cells
    ]
    ours = cells[-1]
    best = min(cells[:-1], key=lambda cell: statistics.mean(cell.p99_s))
    against = next(cell for cell in cells if cell.router == "power_of_two")
    lines.append(
        f"  ours: p99 {_change(ours.p99_s, against.p99_s):+.0%} against power_of_two; less "
        f"{best.router} (best baseline): {_paired(ours.p99_s, best.p99_s)} s"
    )
    return "\n".join(lines)


def _mean(values: list[float]) -> str:
    return f"{statistics.mean(values):6.2f} [{min(values):.2f}, {max(values):.2f}]"


def _change(ours: list[float], theirs: list[float]) -> float:
    return statistics.mean(ours) / max(statistics.mean(theirs), 1e-9) - 1


def _paired(ours: list[float], theirs: list[float]) -> str:
    """Return the mean paired difference and its 95 % interval."""
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    mean = statistics.mean(differences)
    if len(differences) < 2:
        return f"{mean:+.2f}"
    t = _T95[min(len(differences) - 2, len(_T95) - 1)]
    half = t * statistics.stdev(differences) / len(differences) ** 0.5
    return f"{mean:+.2f} ± {half:.2f}"


def as_json(cells: Sequence[Cell]) -> dict[str, Any]:
    traces: dict[str, Any] = {}
    for cell in cells:
        sizes = traces.setdefault(f"{cell.trace}@{cell.load_percent}", {"replicas": {}})["replicas"]
        sizes.setdefault(str(cell.replicas), {})[cell.router] = {
            "wait_p50_s": round(statistics.mean(cell.p50_s), 4),
            "wait_p99_s": round(statistics.mean(cell.p99_s), 4),
            "preemptions": statistics.mean(cell.preemptions),
        }
    return {"traces": traces}


def draw(cells: Sequence[Cell], path: Path) -> None:
    """Draw the p99 wait by fleet size, a panel for each trace and load.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = list(dict.fromkeys((cell.trace, cell.load_percent) for cell in cells))
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(4 * columns, 3 * rows), squeeze=False, layout="constrained"
    )
    for axis, panel in zip(axes.flat, panels, strict=False):
        for name in ROUTERS:
            row = [c for c in cells if (c.trace, c.load_percent) == panel and c.router == name]
            axis.plot(
                [cell.replicas for cell in row],
                [max(statistics.mean(cell.p99_s), 0.01) for cell in row],
                marker="o", label=name, linewidth=2.5 if name == "ours" else 1,
            )  # fmt: skip
        sizes = sorted({cell.replicas for cell in cells})
        axis.set(title=f"{panel[0]} at {panel[1]} %", xscale="log", yscale="log")
        axis.set(xlabel="replicas", ylabel="p99 wait, s")
        axis.set_xticks(sizes, [str(size) for size in sizes])
        axis.minorticks_off()
    for unused in list(axes.flat)[len(panels) :]:
        unused.set_axis_off()
    axes.flat[0].legend(fontsize="small")
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m router.simulate", description=__doc__)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--plot", type=Path, help="draw them here (needs matplotlib)")
    parser.add_argument("--traces", nargs="+", choices=list(SCENARIOS), default=list(SCENARIOS))
    parser.add_argument("--loads", nargs="+", type=int, default=[60, 85, 100], metavar="PERCENT")
    parser.add_argument("--replicas", nargs="+", type=int, default=[2, 8, 64, 256])
    parser.add_argument("--seeds", type=int, default=5)
    profiles = json.loads(PROFILES.read_text())
    parser.add_argument("--profile", choices=list(profiles), default="cpu", help="service times")
    parser.add_argument("--blocks", type=int, help="KV blocks of a replica; else the profile's")
    args = parser.parse_args(argv)
    if min(args.replicas) < 2 or min(args.loads) < 1 or args.seeds < 1:
        parser.error("replicas start at 2, loads and seeds at 1")
    times = ServiceTimes(**profiles[args.profile]["times"])
    if args.blocks is not None:
        times = times._replace(blocks_total=args.blocks)
    print(f"one replica: {times._asdict()}")
    cells = run(args.traces, args.loads, args.replicas, args.seeds, times)
    if args.json:
        args.json.write_text(json.dumps(as_json(cells), indent=2) + "\n")
    if args.plot:
        draw(cells, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
