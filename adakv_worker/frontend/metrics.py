"""Prometheus metrics of compression, beside vLLM's own on `/metrics` of `vllm serve`."""

import functools
from typing import Any, NamedTuple, Self

from prometheus_client import Counter, Histogram
from vllm.config import VllmConfig
from vllm.v1.metrics.loggers import StatLoggerBase
from vllm.v1.metrics.stats import SchedulerStats

from adakv_worker.config import compression_config
from adakv_worker.frontend import metric_names
from adakv_worker.frontend import validator as request_options
from adakv_worker.stats import MemoryStats, proofs_of

_LABELS = ("model_name", "engine")


class _Metrics(NamedTuple):
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
        """The process's: a name can be registered once, and engines come and go."""
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
    """vLLM's front end makes one for each engine; so it also tells the front end the bounds that
    requests are held to."""

    def __init__(self, vllm_config: VllmConfig, engine_index: int = 0) -> None:
        config = compression_config(vllm_config.additional_config)
        request_options.bound_by(config)
        self._metrics = _Metrics.registered() if config is not None else None
        model = vllm_config.model_config.served_model_name
        self._labels = (str(model), str(engine_index))

    def record(self, scheduler_stats: SchedulerStats | None, *args: Any, **kwargs: Any) -> None:
        if scheduler_stats is not None and self._metrics is not None:
            for proof in proofs_of(scheduler_stats):
                self._note(self._metrics, proof)
            if (memory := MemoryStats.of(scheduler_stats)) is not None:
                evictions = self._metrics.decode_evictions.labels(*self._labels)
                evictions.inc(memory.decode_evictions)
                failures = self._metrics.selection_failures.labels(*self._labels)
                failures.inc(memory.selection_failures)

    def _note(self, metrics: _Metrics, proof: dict[str, Any]) -> None:
        labels = self._labels
        metrics.requests.labels(*labels, proof["policy"], proof["skipped"] or "no").inc()
        if proof["skipped"] is None:
            metrics.original_tokens.labels(*labels).inc(proof["original_tokens"])
            metrics.kept_tokens.labels(*labels).inc(proof["kept_mean"])
            # One that takes slabs to stay within its bound may free none.
            freed = max(0, proof["blocks_before"] - proof["blocks_after"])
            metrics.freed_blocks.labels(*labels).inc(freed)
            metrics.kept_share.labels(*labels).observe(
                proof["kept_mean"] / proof["original_tokens"]
            )
            metrics.blocks_after.labels(*labels).observe(proof["blocks_after"])

    def log_engine_initialized(self) -> None:
        pass
