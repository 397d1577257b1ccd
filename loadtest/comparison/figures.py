"""The figures of a comparison from its runs: medians over repetitions, ratios, and the bound."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from adakv_serve.loadtest.client.records import Limits, summary
from adakv_serve.loadtest.comparison.bound import bound
from adakv_serve.loadtest.comparison.config import CompareConfig, LoadConfig
from adakv_serve.loadtest.comparison.order import Unit
from adakv_serve.loadtest.comparison.runs import LoadRun, UnitRun, prefill_only
from adakv_serve.loadtest.servers.occupancy import Look

# Figures that an arm reports as the median over its repetitions.
_MEDIANS = (
    "tokens_per_s", "requests_per_s", "elapsed_s", "ttft_p50_s", "ttft_p95_s", "ttft_p99_s",
    "tpot_p50_s", "tpot_p95_s", "itl_p50_s", "itl_p95_s", "e2e_p50_s", "e2e_p95_s",
    "goodput_requests_per_s", "good_share", "late_p95_s", "preemptions", "peak_running",
    "peak_occupancy", "decode_tokens_per_s", "output_tokens", "prefix_hit_tokens",
    "computed_prompt_tokens", "compressed",
)  # fmt: skip


def arm_figures(config: CompareConfig, done: Mapping[Unit, UnitRun]) -> list[dict[str, Any]]:
    """Return one object for each arm and load, in the configuration's order.

    Ratios are taken within a repetition; `ratio_to_stock` is their median. An arm that crashed has
    `crashed`, and the figures of its runs before.
    """
    rows = []
    for load in config.loads:
        each = {
            unit: _one_run(run.loads[load.name], load)
            for unit, run in done.items()
            if load.name in run.loads
        }
        prefill_s = _prefill_s_per_token(config, load, [run.loads for run in done.values()])
        reference = [one for unit, one in each.items() if unit.arm == config.reference]
        for arm in config.arms:
            mine = {unit: one for unit, one in each.items() if unit.arm == arm}
            row: dict[str, Any] = {
                "name": arm,
                "workload": load.name,
                "kv_bytes": config.kv_bytes(arm),
                "beside_kv_bytes": config.arms[arm].beside_kv_bytes,
                "repetitions": len(mine),
                **_medians(list(mine.values())),
                "written": {unit.repetition: one["output_tokens"] for unit, one in mine.items()},
                **_ratio(config, each, mine),
                "bound": _bound(list(mine.values()), reference, prefill_s),
            }
            crashes = [run.crashed for unit, run in done.items() if unit.arm == arm and run.crashed]
            if crashes:
                row["crashed"] = crashes
            rows.append(row)
    return rows


def output_tokens_equal(rows: Sequence[dict[str, Any]], load: str) -> bool:
    """Return whether all arms wrote equally many tokens in each repetition of a load."""
    written = [row["written"] for row in rows if row["workload"] == load]
    repetitions = {repetition for one in written for repetition in one}
    return all(
        len({one[repetition] for one in written if repetition in one}) <= 1
        for repetition in repetitions
    )


def _one_run(run: LoadRun, load: LoadConfig) -> dict[str, Any]:
    limits = None
    if load.limit_ttft_s is not None or load.limit_tpot_s is not None:
        limits = Limits(load.limit_ttft_s, load.limit_tpot_s)
    return {**summary(run.records, limits), **_from_ledger(run.looks)}


def _from_ledger(looks: Sequence[Look]) -> dict[str, Any]:
    """Return peaks over time, and the decode rate at the peak batch.

    Replicas report rates over some seconds; the best one at the peak has no prefill in it.
    """
    totals = [_sums(look) for look in looks if look.loads]
    if not totals:
        return {}
    peak = max(one["running"] for one in totals)
    at_peak = [one["decode_tokens_per_s"] for one in totals if one["running"] >= 0.9 * peak]
    return {
        "peak_running": peak,
        "peak_occupancy": round(max(one["occupancy"] for one in totals), 3),
        "preemptions": totals[-1]["preemptions"] - totals[0]["preemptions"],
        "decode_tokens_per_s": round(max(at_peak), 2),
    }


def _sums(look: Look) -> dict[str, float]:
    names = ("running", "decode_tokens_per_s", "preemptions")
    sums = {name: sum(load[name] for load in look.loads) for name in names}
    total = sum(load["blocks_total"] for load in look.loads)
    free = sum(load["blocks_free"] for load in look.loads)
    return {**sums, "occupancy": 1 - free / max(total, 1)}


class Moment(NamedTuple):
    """The replicas together. occupancy: share of blocks in use. preemptions: since the first."""

    at_s: float
    running: float
    occupancy: float
    preemptions: float


def over_time(looks: Sequence[Look]) -> list[Moment]:
    """Add up the replicas at each look that has any."""
    sums = [(look.at_s, _sums(look)) for look in looks if look.loads]
    return [
        Moment(
            at_s, one["running"], one["occupancy"], one["preemptions"] - sums[0][1]["preemptions"]
        )
        for at_s, one in sums
    ]


def _medians(runs: list[dict[str, Any]]) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for name in _MEDIANS:
        values = [run[name] for run in runs if run.get(name) is not None]
        row[name] = round(statistics.median(values), 5) if values else None
    rates = [run["tokens_per_s"] for run in runs]
    row["tokens_per_s_range"] = [min(rates), max(rates)] if rates else None
    row["failures"] = sum(sum(run["failures"].values()) for run in runs)
    row["failure_reasons"] = sorted({reason for run in runs for reason in run["failures"]})
    return row


def _ratio(
    config: CompareConfig, each: dict[Unit, dict[str, Any]], mine: dict[Unit, dict[str, Any]]
) -> dict[str, Any]:
    ratios = [
        one["tokens_per_s"] / reference["tokens_per_s"]
        for unit, one in mine.items()
        if (reference := each.get(Unit(unit.repetition, config.reference)))
        and reference["tokens_per_s"]
    ]
    if not ratios:
        return {"ratio_to_stock": None, "ratio_range": None}
    return {
        "ratio_to_stock": round(statistics.median(ratios), 4),
        "ratio_range": [round(min(ratios), 4), round(max(ratios), 4)],
    }


def _prefill_s_per_token(
    config: CompareConfig, load: LoadConfig, runs: Sequence[dict[str, LoadRun]]
) -> float | None:
    """Return the seconds in which the reference computes a token of the load's prompts alone."""
    records = [
        record
        for loads in runs
        if (run := loads.get(prefill_only(load).name))
        for record in run.records
        if record.ttft_s is not None
    ]
    tokens = sum(record.prompt_tokens - record.cached_tokens for record in records)
    return sum(record.ttft_s or 0.0 for record in records) / tokens if tokens else None


def _bound(
    runs: list[dict[str, Any]],
    reference: list[dict[str, Any]],
    prefill_s_per_token: float | None,
) -> float | None:
    """Return the bound from the reference's time and both decode rates, where all were measured."""
    mine, theirs = (
        [rate for run in some if (rate := run.get("decode_tokens_per_s"))]
        for some in (runs, reference)
    )
    if not mine or not theirs or prefill_s_per_token is None:
        return None
    total = statistics.median(run["elapsed_s"] for run in reference)
    ours, computed = (
        statistics.median(run["computed_prompt_tokens"] for run in some)
        for some in (runs, reference)
    )
    gain = statistics.median(mine) / statistics.median(theirs)
    share = ours / computed if computed else 1.0
    return round(bound(total, prefill_s_per_token * computed, gain, share), 4)
