"""Plots of fidelity against kept entries, a line for each policy."""

import statistics
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from adakv_serve.evals.choice import FULL
from adakv_serve.evals.results.scores import Row

_MEASURES = {"agreement": "top-1 agreement with the whole cache", "exact": "exact answers"}


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw a row of axes for each model, mode and length; the suffix of `path` is the format.

    Raises:
        ValueError: the rows have no forced answers, or the format is unknown.
    """
    groups: dict[tuple[str, str, int], list[Row]] = {}
    for row in rows:
        if row.kl is not None:
            groups.setdefault((row.model, row.mode, row.document_tokens), []).append(row)
    if not groups:
        raise ValueError("the results hold no forced answers")
    figure = Figure(figsize=(11, 4 * len(groups)), layout="constrained")
    grid = figure.subplots(len(groups), len(_MEASURES), squeeze=False)
    for axes_of_group, (name, mine) in zip(grid, groups.items(), strict=True):
        for axes, (measure, title) in zip(axes_of_group, _MEASURES.items(), strict=True):
            _draw_measure(axes, mine, measure)
            axes.set_title(f"{name[0]}, {name[1]}, {name[2]} tokens", fontsize="small")
            axes.set_ylabel(title)
        axes_of_group[-1].legend(fontsize="x-small")
    figure.savefig(path)


def _draw_measure(axes: Axes, rows: Sequence[Row], measure: str) -> None:
    policies = dict.fromkeys(row.policy for row in rows if row.policy != FULL)
    for number, policy in enumerate(policies):
        cells: dict[str, list[Row]] = {}
        for row in rows:
            if row.policy == policy and getattr(row, measure) is not None:
                cells.setdefault(row.kept, []).append(row)
        points = sorted(
            (
                statistics.fmean(row.kept_tokens or 0.0 for row in some),
                statistics.fmean(getattr(row, measure) for row in some),
            )
            for some in cells.values()
        )
        # Colours repeat after ten.
        line = "-" if number < 10 else "--"
        axes.plot(*zip(*points, strict=True), line, marker="o", markersize=3, label=policy)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("entries kept for each head")
    axes.grid(alpha=0.3)
