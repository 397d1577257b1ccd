"""What a running engine tells of its KV memory and its requests, made of vLLM's statistics."""

import asyncio
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.output_processor import RequestState
from vllm.v1.metrics.loggers import StatLoggerBase
from vllm.v1.metrics.stats import SchedulerStats

from adakv_worker.moving_core import MovingCore
from adakv_worker.stats import MemoryStats, proofs_of
from kernels.blocks import blocks_for_tokens

_RATE_WINDOW_S = 5.0


class EngineLoad(NamedTuple):
    """What an engine tells about its KV memory. Blocks exclude vLLM's null block.

    told_at: when it did, by the monotonic clock.
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
    blocks_lent: int = 0
    blocks_borrowed: int = 0
    told_at: float = float("inf")


class LoadStats:
    """Keeps the newest scheduler statistics; `logger` is the factory that vLLM calls."""

    def __init__(self, on_proof: Callable[[dict[str, Any]], None]) -> None:
        self._on_proof = on_proof
        self.changed = asyncio.Event()
        self.latest = SchedulerStats()
        self.preemptions = 0
        self._decode_evictions = 0
        self._told_at = float("-inf")
        self._tokens: list[tuple[float, int]] = []

    def logger(self, vllm_config: Any, engine_index: int = 0) -> StatLoggerBase:
        return _LoadLogger(self)

    def note(self, scheduler_stats: SchedulerStats, generated_tokens: int) -> None:
        now = time.monotonic()
        self.latest = scheduler_stats
        self._told_at = now
        for proof in proofs_of(scheduler_stats):
            self._on_proof(proof)
        if (memory := MemoryStats.of(scheduler_stats)) is not None:
            self._decode_evictions += memory.decode_evictions
        self._tokens.append((now, generated_tokens))
        while self._tokens and now - self._tokens[0][0] > _RATE_WINDOW_S:
            self._tokens.pop(0)
        self.changed.set()

    def load(self, engine: AsyncLLM) -> EngineLoad:
        cache = engine.vllm_config.cache_config
        total = (cache.num_gpu_blocks or 1) - 1
        requests, guests = _here(engine)
        # An abort frees blocks without a step to report it: with no request left, nothing is held.
        stats = self.latest if requests or guests else SchedulerStats()
        waiting = stats.num_waiting_reqs + stats.num_skipped_waiting_reqs
        unstarted = [state.prompt_len or 0 for state in requests if state.is_prefilling]
        # Stock vLLM tells less; its waiting prompts are what they take.
        memory = MemoryStats.of(stats)
        waiting_blocks = _waiting_blocks(unstarted, waiting, cache.block_size)
        if memory:
            waiting_blocks = memory.waiting_blocks
        newest = _unseen(requests, guests, stats.num_running_reqs + waiting)
        prompts = [blocks_for_tokens(length, cache.block_size) for length in newest]
        # An engine that was idle has begun the first of them.
        begun = 1 if newest and stats.num_running_reqs + waiting == 0 else 0
        if waiting_blocks is not None:
            waiting_blocks += sum(prompts[begun:])
        free = max(0, round((1 - stats.kv_cache_usage) * total) - sum(prompts[:begun]))
        compressed = memory.compressed_blocks if memory else 0
        # What is free once the last request has ended is evictable still.
        cached = MemoryStats.of(self.latest)
        return EngineLoad(
            block_size_tokens=cache.block_size,
            blocks_total=total,
            blocks_free=free,
            blocks_evictable=min(cached.evictable_blocks, free) if cached else None,
            blocks_compressed=compressed,
            blocks_uncompressed=max(0, total - free - compressed),
            blocks_reserved_growth=memory.growth_blocks if memory else 0,
            running=stats.num_running_reqs + begun,
            waiting=waiting + len(newest) - begun,
            waiting_blocks=waiting_blocks,
            prefill_tokens_queued=(
                memory.queued_prefill_tokens + sum(newest) if memory else sum(unstarted)
            ),
            decode_tokens_per_s=self._decode_tokens_per_s(),
            achieved_compression=(
                memory.kept_tokens / memory.original_tokens
                if memory and memory.original_tokens
                else 1.0
            ),
            preemptions=self.preemptions,
            # Of the engine's whole life, so not forgotten with its last request.
            recomputed_tokens=cached.recomputed_tokens if cached else None,
            decode_evictions=self._decode_evictions if cached else None,
            told_at=self._told_at,
        )

    def _decode_tokens_per_s(self) -> float:
        since = time.monotonic() - _RATE_WINDOW_S
        return sum(count for at, count in self._tokens if at > since) / _RATE_WINDOW_S


class _LoadLogger(StatLoggerBase):
    def __init__(self, stats: LoadStats) -> None:
        self._stats = stats

    def record(self, scheduler_stats: Any, iteration_stats: Any, *args: Any, **kwargs: Any) -> None:
        # Those of a request that is away come without the engine's own statistics.
        self._stats.preemptions += iteration_stats.num_preempted_reqs if iteration_stats else 0
        if scheduler_stats is not None:
            generated = iteration_stats.num_generation_tokens if iteration_stats else 0
            self._stats.note(scheduler_stats, generated)

    def log_engine_initialized(self) -> None:
        pass


def _waiting_blocks(prompt_lens: list[int], waiting: int, block_size: int) -> int | None:
    """Blocks that the waiting prompts need, when they can be told apart from those in prefill."""
    if waiting == 0:
        return 0
    if len(prompt_lens) != waiting:
        return None
    return sum(blocks_for_tokens(length, block_size) for length in prompt_lens)


def _here(engine: AsyncLLM) -> tuple[list[RequestState], int]:
    """Clients' requests that this engine works on, oldest first, and its number of guests."""
    core = engine.engine_core
    states = engine.output_processor.request_states
    if not isinstance(core, MovingCore):
        return list(states.values()), 0
    here = [state for name, state in states.items() if not core.is_away(name)]
    return here, core.guests


def _unseen(requests: list[RequestState], guests: int, seen: int) -> list[int]:
    """Prompt lengths of the requests that are in no statistics yet.

    A step with a long prefill takes seconds, and what has come since is the newest.
    """
    count = max(0, len(requests) + guests - seen)
    # A guest comes with its cache, and has nothing to prefill.
    count = min(count, len(requests))
    return [state.prompt_len or 0 for state in requests[len(requests) - count :]]
