"""Prometheus metrics of compression, on `/metrics` of `vllm serve` beside vLLM's own."""

import functools
from typing import Any, NamedTuple, Self

from prometheus_client import Counter, Histogram
from vllm.config import VllmConfig
from vllm.v1.metrics.loggers import StatLoggerBase
from vllm.v1.metrics.stats import SchedulerStats

from adakv_worker.config import compression_config
from adakv_worker.frontend import metric_names
from adakv_worker.frontend import validator as request_options
from adakv_worker.messages import Proof
from adakv_worker.statistics_carrier import figures_of

_LABELS = ("model_name", "engine")


class _Metrics(NamedTuple):
    """Metrics of this process. Each name can be registered once, but engines come and go."""

    requests: Counter
    original_tokens: Counter
    kept_tokens: Counter
    freed_blocks: Counter
    kept_share: Histogram
    blocks_after: Histogram
    decode_evictions: Counter
    selection_failures: Counter

    @classmethod
    @functools.cache
    def registered(cls) -> Self:
        """Return the metrics, registered by the first call."""
        return cls(
            Counter(*metric_names.REQUESTS, (*_LABELS, "policy", "skipped")),
            Counter(*metric_names.ORIGINAL_TOKENS, _LABELS),
            Counter(*metric_names.KEPT_TOKENS, _LABELS),
            Counter(*metric_names.FREED_BLOCKS, _LABELS),
            Histogram(*metric_names.KEPT_SHARE, _LABELS, buckets=metric_names.SHARE_BUCKETS),
            Histogram(*metric_names.BLOCKS_AFTER, _LABELS, buckets=metric_names.BLOCK_BUCKETS),
            Counter(*metric_names.DECODE_EVICTIONS, _LABELS),
            Counter(*metric_names.SELECTION_FAILURES, _LABELS),
        )


class CompressionLogger(StatLoggerBase):
    """Records compression of one engine.

    vLLM's front end creates it with the engine's configuration, before the first request. So it
    also sets the bounds of requests there.
    """

    def __init__(self, vllm_config: VllmConfig, engine_index: int = 0) -> None:
        config = compression_config(vllm_config.additional_config)
        request_options.bound_by(config)
        self._metrics = _Metrics.registered() if config is not None else None
        model = vllm_config.model_config.served_model_name
        self._labels = (str(model), str(engine_index))

    def record(self, scheduler_stats: SchedulerStats | None, *args: Any, **kwargs: Any) -> None:
        if scheduler_stats is None or self._metrics is None:
            return
        if (figures := figures_of(scheduler_stats)) is not None:
            for proof in figures.proofs:
                self._note(self._metrics, proof)
            evictions = self._metrics.decode_evictions.labels(*self._labels)
            evictions.inc(figures.memory.decode_evictions)
            failures = self._metrics.selection_failures.labels(*self._labels)
            failures.inc(figures.memory.selection_failures)

    def _note(self, metrics: _Metrics, proof: Proof) -> None:
        labels = self._labels
        metrics.requests.labels(*labels, proof.policy, proof.skipped or "no").inc()
        if proof.compressed:
            metrics.original_tokens.labels(*labels).inc(proof.original_tokens)
            metrics.kept_tokens.labels(*labels).inc(proof.kept_mean)
            metrics.freed_blocks.labels(*labels).inc(proof.freed_blocks)
            metrics.kept_share.labels(*labels).observe(proof.kept_share)
            metrics.blocks_after.labels(*labels).observe(proof.blocks_after)

    def log_engine_initialized(self) -> None:
        pass
