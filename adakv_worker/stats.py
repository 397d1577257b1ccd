"""What the scheduler tells its front end about compression, beside vLLM's statistics.

vLLM's statistics cross the process boundary field by field, so that an attribute would be lost. All
of this rides in a field that is a dict of counts and that nobody reads without LoRA.
"""

import json
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from vllm.v1.metrics.stats import SchedulerStats

_MEMORY_PREFIX = "adakv."
_PROOF_PREFIX = "adakv-proof."


class MemoryStats(NamedTuple):
    """Of one engine, after a step.

    compressed_blocks: held by compressed requests.
    growth_blocks: what the running requests will take besides, at the peak of their lives.
    waiting_blocks: what starting all waiting requests would take, slabs included.
    queued_prefill_tokens: prompt tokens of admitted and waiting requests, not yet computed.
    kept_tokens, original_tokens: prompt tokens of the compressed requests, after and before.
    evictable_blocks: free ones that still hold a prefix, as of the last second.
    recomputed_tokens: computed a second time since the engine's start, see `Recomputes`.
    decode_evictions: since the statistics before, of requests that had grown to their bounds.
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

    def attach(self, stats: SchedulerStats) -> None:
        stats.waiting_lora_adapters |= {
            _MEMORY_PREFIX + name: value for name, value in self._asdict().items()
        }

    @classmethod
    def of(cls, stats: SchedulerStats) -> "MemoryStats | None":
        """What was attached, or None: stock vLLM, or LoRA."""
        given = stats.waiting_lora_adapters
        if _MEMORY_PREFIX + cls._fields[0] not in given:
            return None
        return cls(*(given[_MEMORY_PREFIX + name] for name in cls._fields))


def attach_proofs(stats: SchedulerStats, proofs: Iterable[dict[str, Any]]) -> None:
    """Adds the proofs of requests whose prompts this step has completed."""
    counts = stats.waiting_lora_adapters
    for proof in proofs:
        key = _PROOF_PREFIX + json.dumps(proof)
        counts[key] = counts.get(key, 0) + 1


def proofs_of(stats: SchedulerStats) -> Iterator[dict[str, Any]]:
    """The proofs that were attached; none with LoRA."""
    for key, count in stats.waiting_lora_adapters.items():
        if key.startswith(_PROOF_PREFIX):
            proof = json.loads(key.removeprefix(_PROOF_PREFIX))
            yield from (proof for _ in range(count))
