"""What the scheduler tells its front end about compressed memory, beside vLLM's statistics."""

from typing import NamedTuple

from vllm.v1.metrics.stats import SchedulerStats

_PREFIX = "adakv."


class MemoryStats(NamedTuple):
    """Of one engine, after a step.

    compressed_blocks: held by compressed requests.
    growth_blocks: what the running requests will take besides, at the peak of their lives.
    waiting_blocks: what starting all waiting requests would take, slabs included.
    queued_prefill_tokens: prompt tokens of admitted and waiting requests, not yet computed.
    kept_tokens, original_tokens: prompt tokens of the compressed requests, after and before.
    """

    compressed_blocks: int = 0
    growth_blocks: int = 0
    waiting_blocks: int = 0
    queued_prefill_tokens: int = 0
    kept_tokens: int = 0
    original_tokens: int = 0

    def attach(self, stats: SchedulerStats) -> None:
        # vLLM's statistics cross the process boundary field by field, so that an attribute would be
        # lost. This field is a dict of counts that nobody reads without LoRA.
        stats.waiting_lora_adapters |= {
            _PREFIX + name: value for name, value in self._asdict().items()
        }

    @classmethod
    def of(cls, stats: SchedulerStats) -> "MemoryStats | None":
        """What was attached, or None: stock vLLM, or LoRA."""
        given = stats.waiting_lora_adapters
        if _PREFIX + cls._fields[0] not in given:
            return None
        return cls(*(given[_PREFIX + name] for name in cls._fields))
