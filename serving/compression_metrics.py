"""Compression figures of a replica on Ray's Prometheus endpoint."""

from typing import Any

from ray.serve.metrics import Counter, Histogram

from adakv_worker.frontend import metric_names
from adakv_worker.messages import Proof


class CompressionMetrics:
    """Counts completed prompts by policy and by why they were not compressed."""

    def __init__(self) -> None:
        labels: Any = ("policy", "skipped")  # Annotated as one name, takes any.
        self._requests = Counter(*metric_names.REQUESTS, labels)
        self._original = Counter(*metric_names.ORIGINAL_TOKENS)
        self._kept = Counter(*metric_names.KEPT_TOKENS)
        self._freed = Counter(*metric_names.FREED_BLOCKS)
        self._share = Histogram(*metric_names.KEPT_SHARE, metric_names.SHARE_BUCKETS)
        self._blocks = Histogram(*metric_names.BLOCKS_AFTER, metric_names.BLOCK_BUCKETS)

    def note(self, proof: Proof) -> None:
        tags = {"policy": proof.policy, "skipped": proof.skipped or "no"}
        self._requests.inc(tags=tags)
        if proof.compressed:
            self._original.inc(proof.original_tokens)
            self._kept.inc(proof.kept_mean)
            self._freed.inc(proof.freed_blocks)
            self._share.observe(proof.kept_share)
            self._blocks.observe(proof.blocks_after)
