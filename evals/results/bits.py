"""Tables and plots of quality at equal bytes: fewer entries, or fewer bits in each."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from adakv_serve.evals.choice import FULL
from adakv_serve.evals.results.scores import Row

# Shares of the bytes that a whole prompt takes at 16 bits.
SHARES = (1 / 2, 1 / 4, 1 / 8, 1 / 16)
# By the end of a model's name in results: bits of a number, and bytes of an entry's scale.
_FORMATS = {
    "": ("16 bits", 16, 0),
    ", fp8 pages": ("fp8", 8, 0),
    ", fp8_e5m2 pages": ("fp8_e5m2", 8, 0),
    ", simulated int8 pages": ("int8", 8, 4),
    ", simulated int4 pages": ("int4", 4, 4),
}
# An entry's scale makes it larger; cells may be this much over their share.
_OVER = 13 / 12


class Point(NamedTuple):
    """Means over the tasks of one policy, budget and format.

    share: of the bytes that the whole prompt takes at 16 bits.
    """

    format: str
    policy: str
    kept: str
    share: float
    agreement: float
    kl: float


def _format(model: str) -> tuple[str, str]:
    """Return a model's own name, and what follows it in `_FORMATS`."""
    name, comma, rest = model.partition(",")
    return name, comma + rest


def points(rows: Iterable[Row], head_size: int) -> dict[tuple[str, str, int], list[Point]]:
    """Return all points by model, mode and length of documents, over the tasks of all formats.

    Args:
        head_size: numbers of a key, and of a value.

    Raises:
        ValueError: a model's pages have an unknown format.
    """
    cells: dict[tuple[str, str, int], dict[tuple[str, str, str], list[Row]]] = {}
    for row in rows:
        name, pages = _format(row.model)
        if pages not in _FORMATS:
            raise ValueError(f"{row.model}: pages of an unknown format")
        if row.policy != FULL and row.kl is not None:
            group = cells.setdefault((name, row.mode, row.document_tokens), {})
            group.setdefault((pages, row.policy, row.kept), []).append(row)
    return {key: _points(group, head_size) for key, group in cells.items()}


def _points(group: Mapping[tuple[str, str, str], list[Row]], head_size: int) -> list[Point]:
    tasks: dict[str, set[str]] = {}
    for (pages, _, _), rows in group.items():
        tasks.setdefault(pages, set()).update(row.task for row in rows)
    common = set.intersection(*tasks.values())
    cells = {cell: [row for row in rows if row.task in common] for cell, rows in group.items()}
    return [_point(*cell, rows, head_size) for cell, rows in cells.items() if rows]


def _point(pages: str, policy: str, kept: str, rows: Sequence[Row], head_size: int) -> Point:
    name, bits, scale_bytes = _FORMATS[pages]
    entry = (head_size * bits / 8 + scale_bytes) / (2 * head_size)
    kept_shares = [
        sample["kept_tokens"] / sample["prompt_tokens"] for row in rows for sample in row.samples
    ]
    return Point(
        name, policy, kept, statistics.fmean(kept_shares) * entry,
        statistics.fmean(row.agreement for row in rows if row.agreement is not None),
        statistics.fmean(row.kl for row in rows if row.kl is not None),
    )  # fmt: skip


def front(points: Sequence[Point], share: float) -> dict[str, Point]:
    """Return each format's point of least KL among those of about so many bytes."""
    fitting = [point for point in points if share / 2 * _OVER < point.share <= share * _OVER]
    formats = dict.fromkeys(point.format for point in points)
    return {
        name: min(mine, key=lambda point: point.kl)
        for name in formats
        if (mine := [point for point in fitting if point.format == name])
    }


def table(rows: Iterable[Row], head_size: int) -> str:
    """Return tables of the best policy of each format at each share, the best format in bold."""
    parts = []
    for (model, mode, tokens), mine in points(rows, head_size).items():
        fronts = [front(mine, share) for share in SHARES]
        formats = dict.fromkeys(point.format for point in mine)
        lines = [
            f"## {model}, {mode}, documents of {tokens} tokens",
            "",
            _line(["agreement / KL", *(f"1/{round(1 / share)} of the bytes" for share in SHARES)]),
            _line(["---"] * (len(SHARES) + 1)),
            *(_line([name, *(_cell(name, best) for best in fronts)]) for name in formats),
        ]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _cell(name: str, best: dict[str, Point]) -> str:
    point = best.get(name)
    if point is None:
        return ""
    text = f"{point.policy} {point.kept}: {point.agreement:.3f} / {point.kl:.3f}"
    return f"**{text}**" if point.kl == min(one.kl for one in best.values()) else text


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def draw(rows: Iterable[Row], head_size: int, path: Path) -> None:
    """Draw KL against bytes, a line for each format's best policy; the suffix is the format."""
    from matplotlib.figure import Figure

    groups = points(rows, head_size)
    figure = Figure(figsize=(5.5 * len(groups), 4), layout="constrained")
    for axes, ((model, mode, _), mine) in zip(
        figure.subplots(1, len(groups), squeeze=False)[0], groups.items(), strict=True
    ):
        for name in dict.fromkeys(point.format for point in mine):
            line: dict[float, float] = {}
            for point in (point for point in mine if point.format == name):
                share = round(point.share, 3)
                line[share] = min(line.get(share, math.inf), point.kl)
            axes.plot(*zip(*sorted(line.items()), strict=True), marker="o", label=name)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("share of a whole prompt's bytes at 16 bits")
        axes.set_ylabel("KL, nats")
        axes.set_title(f"{model}, {mode}", fontsize="small")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(path)
