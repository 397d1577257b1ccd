"""Metrics of compression, on vLLM's and on Ray's endpoint: names, descriptions and amounts."""

from typing import NamedTuple

from adakv_worker.messages import Proof


class Metric(NamedTuple):
    """A counter, or with `buckets` a histogram."""

    name: str
    description: str
    buckets: tuple[float, ...] | None = None


REQUESTS = Metric("adakv_requests", "Completed prompts by policy and reason not to compress")
DECODE_EVICTIONS = Metric("adakv_decode_evictions", "Evictions while decoding, of long answers")
SELECTION_FAILURES = Metric(
    "adakv_selection_failures",
    "Requests that kept recent entries because their policy raised an error",
)
ORIGINAL_TOKENS = Metric("adakv_original_tokens", "Prompt tokens before compression")
KEPT_TOKENS = Metric("adakv_kept_tokens", "Mean entries kept of them")
FREED_BLOCKS = Metric("adakv_freed_blocks", "Blocks that compression gave back")
KEPT_SHARE = Metric(
    "adakv_kept_share",
    "Share of a compressed prompt that was kept",
    (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
)
BLOCKS_AFTER = Metric(
    "adakv_blocks_after",
    "Blocks held after compression",
    tuple(float(2**power) for power in range(13)),
)
SESSIONS = Metric(
    "adakv_sessions", "Compressed prompts by where their held cache was, or by why they had none"
)
RESUMED_TOKENS = Metric("adakv_resumed_tokens", "Tokens whose entries held caches had")
SESSIONS_DROPPED = Metric(
    "adakv_sessions_dropped",
    "Held caches that were dropped before a request resumed them, by reason",
)
SESSIONS_HELD = Metric("adakv_sessions_held", "Held caches")
HELD_BLOCKS = Metric("adakv_held_blocks", "Free KV blocks of held caches")
# The metrics of compressed prompts, without a label of their own.
OF_COMPRESSED = (
    ORIGINAL_TOKENS,
    KEPT_TOKENS,
    FREED_BLOCKS,
    KEPT_SHARE,
    BLOCKS_AFTER,
    RESUMED_TOKENS,
)


def request_labels(proof: Proof) -> dict[str, str]:
    """Return the labels with which `REQUESTS` counts a prompt."""
    return {"policy": proof.policy, "skipped": proof.skipped or "no"}


def session_labels(proof: Proof) -> dict[str, str] | None:
    """Return the labels with which `SESSIONS` counts a prompt; None without sessions."""
    if proof.session is None:
        return None
    return {"source": proof.session.source or "none", "skipped": proof.session.skipped or "no"}


def amounts(proof: Proof) -> dict[Metric, float]:
    """Return what a prompt adds to each of `OF_COMPRESSED`; nothing if it was not compressed."""
    if not proof.compressed:
        return {}
    return {
        RESUMED_TOKENS: proof.session.resumed_tokens if proof.session is not None else 0,
        ORIGINAL_TOKENS: proof.original_tokens,
        KEPT_TOKENS: proof.kept_mean,
        FREED_BLOCKS: proof.freed_blocks,
        KEPT_SHARE: proof.kept_share,
        BLOCKS_AFTER: proof.blocks_after,
    }
