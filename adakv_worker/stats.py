"""Figures of compression, sent from the scheduler to its front end with vLLM's statistics.

vLLM's statistics cross the process boundary field by field, so that an attribute would be lost.
Texts ride as keys of `SchedulerStats.num_kv_fetch_reqs_by_stage`: vLLM fills and reads that dict
only with KV connectors, which compression refuses. Their counts are 0, so that vLLM logs none.
"""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from vllm.v1.metrics.stats import SchedulerStats

_MEMORY = "adakv-memory:"
_PROOFS = "adakv-proofs:"
_LAST_RECEIVED = "adakv-last-received:"


class MemoryStats(NamedTuple):
    """The KV memory of one engine after a step.

    compressed_blocks: held by compressed requests.
    growth_blocks: what the running requests will take besides, at the peak of their lives.
    waiting_blocks: what starting all waiting requests would take, slabs included.
    queued_prefill_tokens: prompt tokens of admitted and waiting requests, not yet computed.
    kept_tokens, original_tokens: prompt tokens of the compressed requests, after and before.
    evictable_blocks: free ones that still hold a prefix, as of the last second.
    recomputed_tokens: computed a second time since the engine's start, see `Recomputes`.
    decode_evictions: since the statistics before, of requests that had grown to their bounds.
    selection_failures: since the statistics before, of requests whose policy raised an error.
    """

    compressed_blocks: int = 0
    growth_blocks: int = 0
    waiting_blocks: int = 0
    queued_prefill_tokens: int = 0
    kept_tokens: int = 0
    original_tokens: int = 0
    evictable_blocks: int = 0
    recomputed_tokens: int = 0
    decode_evictions: int = 0
    selection_failures: int = 0

    def attach(self, stats: SchedulerStats) -> None:
        """Add these figures to a step's statistics."""
        _attach(stats, _MEMORY, json.dumps(self))

    @classmethod
    def of(cls, stats: SchedulerStats) -> "MemoryStats | None":
        """Return what was attached; None with stock vLLM."""
        text = _attached(stats, _MEMORY)
        return None if text is None else cls(*json.loads(text))


def attach_proofs(stats: SchedulerStats, proofs: Sequence[dict[str, Any]]) -> None:
    """Add the proofs of requests whose prompts this step has completed."""
    if proofs:
        _attach(stats, _PROOFS, json.dumps(proofs))


def proofs_of(stats: SchedulerStats) -> list[dict[str, Any]]:
    """Return the proofs that were attached."""
    text = _attached(stats, _PROOFS)
    return [] if text is None else json.loads(text)


def attach_last_received(stats: SchedulerStats, request_id: str | None) -> None:
    """Add the id of the request that the scheduler added last: it counts all up to that one."""
    if request_id is not None:
        _attach(stats, _LAST_RECEIVED, request_id)


def last_received_of(stats: SchedulerStats) -> str | None:
    """Return the id that was attached; None before the first request, and with stock vLLM."""
    return _attached(stats, _LAST_RECEIVED)


def _attach(stats: SchedulerStats, prefix: str, text: str) -> None:
    stats.num_kv_fetch_reqs_by_stage[prefix + text] = 0


def _attached(stats: SchedulerStats, prefix: str) -> str | None:
    for key in stats.num_kv_fetch_reqs_by_stage:
        if key.startswith(prefix):
            return key.removeprefix(prefix)
    return None
