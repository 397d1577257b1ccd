"""The KV memory and the requests of a running engine, from the scheduler's statistics."""

import asyncio
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from vllm.v1.metrics.loggers import StatLoggerBase
from vllm.v1.metrics.stats import SchedulerStats

from adakv_serve.kernels.blocks import blocks_for_tokens
from adakv_worker.frontend.sent_requests import SentRequests
from adakv_worker.messages import MemoryStats, Proof, StepFigures
from adakv_worker.statistics_carrier import figures_of

_RATE_WINDOW_S = 5.0


class EngineLoad(NamedTuple):
    """An engine's KV memory and its requests. Blocks exclude vLLM's null block.

    told_at: time of the scheduler's report, by the monotonic clock.
    """

    block_size_tokens: int
    blocks_total: int
    blocks_free: int
    blocks_evictable: int | None
    blocks_compressed: int
    blocks_uncompressed: int
    blocks_reserved_growth: int
    running: int
    waiting: int
    waiting_blocks: int | None
    prefill_tokens_queued: int
    decode_tokens_per_s: float
    achieved_compression: float
    preemptions: int
    recomputed_tokens: int | None = None
    decode_evictions: int | None = None
    selection_failures: int | None = None
    blocks_held: int = 0
    sessions_held: int = 0
    blocks_lent: int = 0
    blocks_borrowed: int = 0
    moves: int | None = None
    failed_moves: int | None = None
    told_at: float = float("inf")
    prefill_tokens_per_s: float = 0.0
    decode_steps_per_s: float | None = None


class _Computed(NamedTuple):
    """Work of one step: tokens of prompts and of answers, and steps in which answers grew."""

    prompt_tokens: int
    answer_tokens: int
    decode_steps: int


_NOTHING = _Computed(0, 0, 0)


class CacheSize(NamedTuple):
    """The size of an engine's KV cache, without vLLM's null block."""

    blocks: int
    block_size_tokens: int


def from_stock(
    stats: SchedulerStats, cache: CacheSize, unanswered: list[int], preemptions: int = 0
) -> EngineLoad:
    """Return the load from the statistics of any scheduler.

    Args:
        unanswered: prompt lengths of the requests in the scheduler that have no output yet.
    """
    waiting = stats.num_waiting_reqs + stats.num_skipped_waiting_reqs
    free = max(0, round((1 - stats.kv_cache_usage) * cache.blocks))
    return EngineLoad(
        block_size_tokens=cache.block_size_tokens,
        blocks_total=cache.blocks,
        blocks_free=free,
        blocks_evictable=None,
        blocks_compressed=0,
        blocks_uncompressed=cache.blocks - free,
        blocks_reserved_growth=0,
        running=stats.num_running_reqs,
        waiting=waiting,
        waiting_blocks=_waiting_blocks(unanswered, waiting, cache.block_size_tokens),
        prefill_tokens_queued=sum(unanswered),
        decode_tokens_per_s=0.0,
        achieved_compression=1.0,
        preemptions=preemptions,
    )


def from_adakv(load: EngineLoad, memory: MemoryStats) -> EngineLoad:
    """Return the load with the additional figures of a scheduler that compresses."""
    return load._replace(
        blocks_evictable=min(memory.evictable_blocks, load.blocks_free),
        blocks_compressed=memory.compressed_blocks,
        blocks_uncompressed=max(0, load.blocks_total - load.blocks_free - memory.compressed_blocks),
        blocks_reserved_growth=memory.growth_blocks,
        waiting_blocks=memory.waiting_blocks,
        prefill_tokens_queued=memory.queued_prefill_tokens,
        achieved_compression=(
            memory.kept_tokens / memory.original_tokens if memory.original_tokens else 1.0
        ),
        recomputed_tokens=memory.recomputed_tokens,
        blocks_held=min(memory.held_blocks, load.blocks_free),
        sessions_held=memory.sessions_held,
    )


def with_unseen(load: EngineLoad, prompts: list[int]) -> EngineLoad:
    """Return the load with the requests, by prompt length, that no statistics cover yet."""
    blocks = [blocks_for_tokens(length, load.block_size_tokens) for length in prompts]
    # An idle engine has begun the first of them.
    begun = 1 if prompts and load.running + load.waiting == 0 else 0
    taken = min(sum(blocks[:begun]), load.blocks_free)
    free = load.blocks_free - taken
    waiting_blocks = load.waiting_blocks
    return load._replace(
        blocks_free=free,
        blocks_evictable=None
        if load.blocks_evictable is None
        else min(load.blocks_evictable, free),
        blocks_held=min(load.blocks_held, free),
        blocks_uncompressed=load.blocks_uncompressed + taken,
        running=load.running + begun,
        waiting=load.waiting + len(prompts) - begun,
        waiting_blocks=None if waiting_blocks is None else waiting_blocks + sum(blocks[begun:]),
        prefill_tokens_queued=load.prefill_tokens_queued + sum(prompts),
    )


class LoadStats:
    """The newest scheduler statistics. vLLM calls `logger` as the factory of its stat logger."""

    def __init__(self, on_proof: Callable[[Proof], None]) -> None:
        self._on_proof = on_proof
        self.changed = asyncio.Event()
        self.latest = SchedulerStats()
        self._figures: StepFigures | None = None
        # Replaced by the engine's own once the engine is made, which needs `logger` first.
        self.sent = SentRequests()
        self.preemptions = 0
        self._decode_evictions = self._selection_failures = 0
        self._told_at = float("-inf")
        self._computed: list[tuple[float, _Computed]] = []

    def logger(self, vllm_config: Any, engine_index: int = 0) -> StatLoggerBase:
        """Return a stat logger that feeds this object."""
        return _LoadLogger(self)

    def note(
        self, scheduler_stats: SchedulerStats, generated_tokens: int, prefilled_tokens: int = 0
    ) -> None:
        """Take over the statistics of a step."""
        now = time.monotonic()
        self.latest = scheduler_stats
        self._figures = figures = figures_of(scheduler_stats)
        self._told_at = now
        if figures is not None:
            self.sent.receive(figures.last_received)
            for proof in figures.proofs:
                self._on_proof(proof)
            self._decode_evictions += figures.memory.decode_evictions
            self._selection_failures += figures.memory.selection_failures
        steps = 0
        if figures is not None:
            # vLLM counts a prompt when its prefill ends.
            prefilled_tokens, steps = figures.work
        self._computed.append((now, _Computed(prefilled_tokens, generated_tokens, steps)))
        while self._computed and now - self._computed[0][0] > _RATE_WINDOW_S:
            self._computed.pop(0)
        self.changed.set()

    def load(self, cache: CacheSize) -> EngineLoad:
        """Return the present load: the newest statistics and the requests sent since."""
        stats, sent, figures = self.latest, self.sent, self._figures
        if figures is not None:
            unseen = sent.unseen()
        else:
            # Stock statistics count requests without names; the scheduler takes them in order.
            known = stats.num_running_reqs + stats.num_waiting_reqs
            unseen = sent.newest_but(known + stats.num_skipped_waiting_reqs)
        seen = sent.prefill_tokens(sent.unanswered(but=unseen))
        load = from_stock(stats, cache, seen, self.preemptions)
        if figures is not None:
            load = from_adakv(load, figures.memory)._replace(
                decode_evictions=self._decode_evictions,
                selection_failures=self._selection_failures,
            )
        since = time.monotonic() - _RATE_WINDOW_S
        recent = [step for at, step in self._computed if at > since]
        prefilled, decoded, steps = (sum(counts) for counts in zip(_NOTHING, *recent, strict=True))
        return with_unseen(load, sent.prefill_tokens(unseen))._replace(
            decode_tokens_per_s=decoded / _RATE_WINDOW_S,
            prefill_tokens_per_s=prefilled / _RATE_WINDOW_S,
            decode_steps_per_s=None if figures is None else steps / _RATE_WINDOW_S,
            told_at=self._told_at,
        )


class _LoadLogger(StatLoggerBase):
    def __init__(self, stats: LoadStats) -> None:
        self._stats = stats

    def record(self, scheduler_stats: Any, iteration_stats: Any, *args: Any, **kwargs: Any) -> None:
        # Outputs of a request that is away arrive without scheduler statistics.
        self._stats.preemptions += iteration_stats.num_preempted_reqs if iteration_stats else 0
        if scheduler_stats is not None:
            decoded = iteration_stats.num_generation_tokens if iteration_stats else 0
            prefilled = iteration_stats.prompt_token_stats.computed if iteration_stats else 0
            self._stats.note(scheduler_stats, decoded, prefilled)

    def log_engine_initialized(self) -> None:
        pass


def _waiting_blocks(unanswered: list[int], waiting: int, block_size: int) -> int | None:
    """Return the blocks of the waiting prompts; None if some unanswered ones are in prefill."""
    if waiting == 0:
        return 0
    if len(unanswered) != waiting:
        return None
    return sum(blocks_for_tokens(length, block_size) for length in unanswered)
