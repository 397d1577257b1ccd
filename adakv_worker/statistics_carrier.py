"""Carries compression's figures from the scheduler to the front end in vLLM's statistics.

vLLM's statistics cross the process boundary field by field, so that an attribute would be lost.
The figures ride as a key of `SchedulerStats.num_kv_fetch_reqs_by_stage`: vLLM fills and reads that
dict only with KV connectors, which compression refuses. The key's count is 0, so vLLM logs none.
"""

import msgspec
from vllm.v1.metrics.stats import SchedulerStats

from adakv_worker.messages import StepFigures

_PREFIX = "adakv:"


def attach_figures(stats: SchedulerStats, figures: StepFigures) -> None:
    """Add the figures to a step's statistics."""
    stats.num_kv_fetch_reqs_by_stage[_PREFIX + msgspec.json.encode(figures).decode()] = 0


def figures_of(stats: SchedulerStats) -> StepFigures | None:
    """Return the figures that were attached; None with stock vLLM."""
    for key in stats.num_kv_fetch_reqs_by_stage:
        if key.startswith(_PREFIX):
            return msgspec.json.decode(key.removeprefix(_PREFIX), type=StepFigures)
    return None
