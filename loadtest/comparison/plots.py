"""The pictures of a comparison."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from adakv_serve.loadtest.comparison.config import CompareConfig, LoadConfig
from adakv_serve.loadtest.comparison.figures import over_time
from adakv_serve.loadtest.comparison.order import Unit
from adakv_serve.loadtest.comparison.runs import LoadRun, UnitRun

_DPI = 110


def draw(
    config: CompareConfig,
    done: Mapping[Unit, UnitRun],
    rows: Sequence[dict[str, Any]],
    folder: Path,
) -> dict[str, list[str]]:
    """Write PNG files into `folder`; return their names by load."""
    pictures: dict[str, list[str]] = {}
    for load in config.loads:
        by_arm: dict[str, list[LoadRun]] = {arm: [] for arm in config.arms}
        for unit, run in done.items():
            if load.name in run.loads:
                by_arm[unit.arm].append(run.loads[load.name])
        mine = [row for row in rows if row["workload"] == load.name and row["tokens_per_s"]]
        if not mine:
            continue
        figures = {
            "throughput": throughput(load.name, config.reference, mine),
            "latency": _latency(load, by_arm),
            "time": _time(load, by_arm),
        }
        names = [f"{load.name}.{kind}.png" for kind in figures]
        for name, figure in zip(names, figures.values(), strict=True):
            figure.savefig(folder / name)
        pictures[load.name] = names
    return pictures


def throughput(load: str, reference: str, rows: Sequence[dict[str, Any]]) -> Figure:
    """Draw a bar for each arm, its spread over repetitions, and the bound as a line above it."""
    figure = Figure(figsize=(7, 3.6), layout="constrained", dpi=_DPI)
    axes = figure.subplots()
    for x, row in enumerate(rows):
        low, high = row["tokens_per_s_range"]
        rate = row["tokens_per_s"]
        axes.bar(x, rate, 0.6, color="tab:gray" if row["name"] == reference else "tab:blue")
        axes.errorbar(x, rate, [[rate - low], [high - rate]], color="black", capsize=4)
        if row["bound"] is not None and row["ratio_to_stock"]:
            bound = row["bound"] * rate / row["ratio_to_stock"]
            axes.hlines(bound, x - 0.4, x + 0.4, color="tab:red", linestyle="--")
        if row["ratio_to_stock"]:
            axes.annotate(f"{row['ratio_to_stock']:.2f}x", (x, 0), (0, 4), ha="center",
                          textcoords="offset points", color="white")  # fmt: skip
    axes.set_xticks(range(len(rows)), [row["name"] for row in rows])
    axes.set_ylabel("output tokens/s")
    axes.set_title(f"{load}: throughput at equal KV memory (dashed: bound)")
    return figure


def _latency(load: LoadConfig, by_arm: dict[str, list[LoadRun]]) -> Figure:
    figure = Figure(figsize=(9, 3.6), layout="constrained", dpi=_DPI)
    left, right = figure.subplots(1, 2)
    for arm, runs in by_arm.items():
        records = [record for run in runs for record in run.records if record.error is None]
        _cumulative(left, arm, [one.ttft_s for one in records if one.ttft_s is not None])
        _cumulative(right, arm, [one.tpot_s for one in records if one.tpot_s is not None])
    left.set(xlabel="TTFT, s", ylabel="share of requests", title=load.name)
    right.set(xlabel="TPOT, s", title="each token after the first")
    left.legend()
    return figure


def _cumulative(axes: Axes, label: str, values: list[float]) -> None:
    ordered = sorted(values)
    shares = [(index + 1) / len(ordered) for index in range(len(ordered))]
    axes.step(ordered, shares, where="post", label=label)


def _time(load: LoadConfig, by_arm: dict[str, list[LoadRun]]) -> Figure:
    """Draw the first repetition of each arm over time."""
    figure = Figure(figsize=(9, 6), layout="constrained", dpi=_DPI)
    above, middle, below = figure.subplots(3, 1, sharex=True)
    for arm, runs in by_arm.items():
        if runs and (moments := over_time(runs[0].looks)):
            seconds, running, occupancy, preemptions = zip(*moments, strict=True)
            above.plot(seconds, running, label=arm)
            middle.plot(seconds, occupancy)
            below.plot(seconds, preemptions)
    above.set(ylabel="running requests", title=f"{load.name}: first repetition")
    middle.set(ylabel="blocks in use", ylim=(0, 1.05))
    below.set(ylabel="preemptions", xlabel="s")
    above.legend()
    return figure
