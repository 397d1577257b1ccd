"""Compression figures of a replica on Ray's Prometheus endpoint."""

from typing import Any

from ray.serve.metrics import Counter, Histogram

_SHARES = [0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
_BLOCKS = [float(2**power) for power in range(13)]


class CompressionMetrics:
    """Counts finished requests by policy and by why they were not compressed."""

    def __init__(self) -> None:
        self._requests = Counter(
            "adakv_requests", "Finished requests by policy and reason not to compress",
            ("policy", "skipped"),  # type: ignore[arg-type]  # annotated as one name, takes any
        )  # fmt: skip
        self._original = Counter("adakv_original_tokens", "Prompt tokens before compression")
        self._kept = Counter("adakv_kept_tokens", "Mean entries kept of them")
        self._freed = Counter("adakv_freed_blocks", "Blocks that compression gave back")
        self._share = Histogram(
            "adakv_kept_share", "Share of a compressed prompt that was kept", boundaries=_SHARES
        )
        self._blocks = Histogram(
            "adakv_blocks_after", "Blocks held after compression", boundaries=_BLOCKS
        )

    def note(self, proof: dict[str, Any]) -> None:
        tags = {"policy": proof["policy"], "skipped": proof["skipped"] or "no"}
        self._requests.inc(tags=tags)
        if proof["skipped"] is None:
            self._original.inc(proof["original_tokens"])
            self._kept.inc(proof["kept_mean"])
            self._freed.inc(proof["blocks_before"] - proof["blocks_after"])
            self._share.observe(proof["kept_mean"] / proof["original_tokens"])
            self._blocks.observe(proof["blocks_after"])
