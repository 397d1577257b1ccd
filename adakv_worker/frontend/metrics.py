"""Prometheus metrics of compression, on `/metrics` of `vllm serve` beside vLLM's own."""

import functools
from collections.abc import Mapping
from typing import Any

from prometheus_client import Counter, Gauge, Histogram
from vllm.config import VllmConfig
from vllm.v1.metrics.loggers import StatLoggerBase
from vllm.v1.metrics.stats import SchedulerStats

from adakv_worker.byte_budgets import settings_of
from adakv_worker.frontend import metric_names
from adakv_worker.frontend.metric_names import (
    DECODE_EVICTIONS,
    HELD_BLOCKS,
    REQUESTS,
    SELECTION_FAILURES,
    SESSIONS,
    SESSIONS_DROPPED,
    SESSIONS_HELD,
    Metric,
)
from adakv_worker.frontend.validator import bound_by
from adakv_worker.messages import MemoryStats
from adakv_worker.statistics_carrier import figures_of

_LABELS = ("model_name", "engine")


@functools.cache
def _registered() -> dict[Metric, Counter | Gauge | Histogram]:
    """Return the metrics of this process, registered by the first call: engines come and go."""
    counters = (*metric_names.OF_COMPRESSED, DECODE_EVICTIONS, SELECTION_FAILURES)
    held = {metric: _make(metric, _LABELS) for metric in counters}
    return {
        REQUESTS: _make(REQUESTS, (*_LABELS, "policy", "skipped")),
        SESSIONS: _make(SESSIONS, (*_LABELS, "source", "skipped")),
        SESSIONS_DROPPED: _make(SESSIONS_DROPPED, (*_LABELS, "reason")),
        **{
            metric: Gauge(metric.name, metric.description, _LABELS)
            for metric in (SESSIONS_HELD, HELD_BLOCKS)
        },
        **held,
    }


def _make(metric: Metric, labels: tuple[str, ...]) -> Counter | Histogram:
    if metric.buckets is None:
        return Counter(metric.name, metric.description, labels)
    return Histogram(metric.name, metric.description, labels, buckets=metric.buckets)


class CompressionLogger(StatLoggerBase):
    """Records compression of one engine.

    vLLM's front end creates it with the engine's configuration, before the first request. So it
    also sets the bounds of requests there.
    """

    def __init__(self, vllm_config: VllmConfig, engine_index: int = 0) -> None:
        config = settings_of(vllm_config)
        bound_by(config)
        self._metrics = _registered() if config is not None else {}
        model = vllm_config.model_config.served_model_name
        self._labels = (str(model), str(engine_index))
        self._dropped: Mapping[str, int] = {}

    def record(self, scheduler_stats: SchedulerStats | None, *args: Any, **kwargs: Any) -> None:
        if scheduler_stats is None or not self._metrics:
            return
        if (figures := figures_of(scheduler_stats)) is not None:
            for proof in figures.proofs:
                self._add(REQUESTS, 1, *metric_names.request_labels(proof).values())
                if labels := metric_names.session_labels(proof):
                    self._add(SESSIONS, 1, *labels.values())
                for metric, amount in metric_names.amounts(proof).items():
                    self._add(metric, amount)
            self._add_memory(figures.memory)

    def _add_memory(self, memory: MemoryStats) -> None:
        self._add(DECODE_EVICTIONS, memory.decode_evictions)
        self._add(SELECTION_FAILURES, memory.selection_failures)
        self._add(SESSIONS_HELD, memory.sessions_held)
        self._add(HELD_BLOCKS, memory.held_blocks)
        for reason, total in (memory.dropped_sessions or {}).items():
            self._add(SESSIONS_DROPPED, total - self._dropped.get(reason, 0), reason)
        self._dropped = memory.dropped_sessions or {}

    def _add(self, metric: Metric, amount: float, *labels: str) -> None:
        held = self._metrics[metric].labels(*self._labels, *labels)
        if isinstance(held, Counter):
            held.inc(amount)
        elif isinstance(held, Gauge):
            held.set(amount)
        else:
            held.observe(amount)

    def log_engine_initialized(self) -> None:
        pass
