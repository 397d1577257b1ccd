"""A short, fixed run of every preset, and its comparison with recorded figures."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from adakv_serve.evals.policies import POLICIES
from adakv_serve.evals.results.scores import Row
from adakv_serve.evals.run import Plan

PLAN = Plan(
    tasks=("needles", "factbook", "continuation"),
    modes=("aware", "agnostic"),
    policies=POLICIES,
    budgets=(96,),
    ratios=(),
    document_tokens=400,
    samples=3,
    seed=7,
)
RECORDED = Path(__file__).parent / "results" / "gate.jsonl"
# Processors round differently, so a few of the hundred tokens behind a figure differ.
_AGREEMENT_NOISE = 0.05
_KL_NOISE, _KL_NOISE_SHARE = 0.02, 0.1


def recordable(rows: Iterable[Row]) -> list[Row]:
    """Return rows without their samples, which the comparison does not read."""
    return [replace(row, samples=[]) for row in rows]


def moved(recorded: Sequence[Row], now: Sequence[Row]) -> list[str]:
    """Return a line for each mean over tasks that differs by more than noise."""
    before, after = _by_preset(recorded), _by_preset(now)
    lines = [f"{name}: not the same tasks" for name in before.keys() ^ after.keys()]
    for name in before.keys() & after.keys():
        if {row.task for row in before[name]} != {row.task for row in after[name]}:
            lines.append(f"{name}: not the same tasks")
            continue
        was_kl = _mean(before[name], "kl")
        for measure, noise in (
            ("agreement", _AGREEMENT_NOISE),
            ("kl", _KL_NOISE + _KL_NOISE_SHARE * was_kl),
        ):
            was, is_now = _mean(before[name], measure), _mean(after[name], measure)
            if abs(is_now - was) > noise:
                lines.append(f"{name}: {measure} was {was:.3f}, is {is_now:.3f}")
    return sorted(lines)


def _by_preset(rows: Sequence[Row]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(f"{row.mode} {row.policy} {row.kept}", []).append(row)
    return groups


def _mean(rows: Sequence[Row], measure: str) -> float:
    return statistics.fmean(getattr(row, measure) for row in rows)
