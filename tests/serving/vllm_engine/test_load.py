"""The load of a replica, from the scheduler's statistics and the requests sent since."""

import pytest
from vllm.v1.metrics.stats import IterationStats, SchedulerStats

from adakv_serve.serving.vllm_engine.load import (
    CacheSize,
    EngineLoad,
    LoadStats,
    from_adakv,
    from_stock,
    with_unseen,
)
from adakv_worker.messages import MemoryStats, StepFigures, StepWork
from adakv_worker.statistics_carrier import attach_figures

CACHE = CacheSize(blocks=100, block_size_tokens=32)


@pytest.fixture
def engine() -> LoadStats:
    return LoadStats(on_proof=lambda proof: None)


def report(
    engine: LoadStats,
    last_received: str | None = None,
    memory: MemoryStats | None = None,
    **counts: float,
) -> None:
    """Report the end of a step; with `memory` as from a scheduler that compresses."""
    stats = SchedulerStats(**counts)  # type: ignore[arg-type]
    if memory is not None:
        attach_figures(stats, StepFigures(memory, [], last_received))
    engine.note(stats, 0)


def test_speeds_are_of_the_tokens_computed_of_late(engine: LoadStats) -> None:
    step = IterationStats()
    step.num_generation_tokens = 30
    # Cached tokens are no work.
    step.prompt_token_stats.computed, step.prompt_token_stats.total = 500, 900
    for _ in range(2):
        engine.logger(None).record(SchedulerStats(), step)
    load = engine.load(CACHE)
    assert (load.prefill_tokens_per_s, load.decode_tokens_per_s) == (200, 12)
    assert load.decode_steps_per_s is None


def test_an_unfinished_prefill_is_work_of_a_scheduler_that_compresses(engine: LoadStats) -> None:
    stats = SchedulerStats()
    attach_figures(stats, StepFigures(MemoryStats(), [], None, StepWork(500, 1)))
    for _ in range(2):
        engine.logger(None).record(stats, IterationStats())
    load = engine.load(CACHE)
    assert (load.prefill_tokens_per_s, load.decode_steps_per_s) == (200, 0.4)


def test_requests_that_arrive_during_a_step_count_at_once(engine: LoadStats) -> None:
    engine.sent.send("running", 3200)
    engine.sent.send("waiting", 320)
    memory = MemoryStats(waiting_blocks=10, queued_prefill_tokens=320)
    report(engine, "waiting", memory, num_running_reqs=1, num_waiting_reqs=1, kv_cache_usage=0.2)
    engine.sent.send("fresh", 640)
    load = engine.load(CACHE)
    assert (load.running, load.waiting) == (1, 2)
    assert load.waiting_blocks == 10 + 20
    assert load.prefill_tokens_queued == 320 + 640
    report(engine, "fresh", memory, num_running_reqs=2, num_waiting_reqs=1)
    assert (engine.load(CACHE).running, engine.load(CACHE).waiting) == (2, 1)


def test_only_requests_sent_after_the_last_received_are_added(engine: LoadStats) -> None:
    # By counts alone the scheduler would have all three.
    for name in ("first", "second", "fresh"):
        engine.sent.send(name, 320)
    report(engine, "second", MemoryStats(), num_running_reqs=3)
    assert (engine.load(CACHE).running, engine.load(CACHE).waiting) == (3, 1)


def test_requests_that_end_unseen_are_gone_at_once(engine: LoadStats) -> None:
    for name in ("first", "left", "fresh"):
        engine.sent.send(name, 320)
    report(engine, "first", MemoryStats(), num_running_reqs=1)
    engine.sent.end("left")
    assert engine.load(CACHE).prefill_tokens_queued == 320
    report(engine, "left", MemoryStats(), num_running_reqs=1)
    assert engine.load(CACHE).prefill_tokens_queued == 320
    report(engine, "fresh", MemoryStats(), num_running_reqs=2)
    assert (engine.load(CACHE).waiting, engine.load(CACHE).prefill_tokens_queued) == (0, 0)


def test_a_stock_scheduler_has_the_oldest_sent_requests(engine: LoadStats) -> None:
    for name in ("answered", "waiting", "fresh"):
        engine.sent.send(name, 320)
    engine.sent.answer("answered")
    report(engine, num_running_reqs=1, num_waiting_reqs=1)
    load = engine.load(CACHE)
    assert (load.running, load.waiting, load.waiting_blocks) == (1, 2, 20)
    assert load.prefill_tokens_queued == 640
    assert (load.blocks_evictable, load.recomputed_tokens, load.decode_evictions) == (None,) * 3


@pytest.mark.parametrize("memory", [None, MemoryStats(evictable_blocks=100)])
def test_an_idle_engine_has_begun_the_first_request(
    engine: LoadStats, memory: MemoryStats | None
) -> None:
    report(engine, None, memory)
    engine.sent.send("first", 320)
    engine.sent.send("second", 640)
    load = engine.load(CACHE)
    assert (load.running, load.waiting) == (1, 1)
    assert (load.blocks_free, load.blocks_uncompressed, load.waiting_blocks) == (90, 10, 20)
    assert load.prefill_tokens_queued == 960
    assert load.blocks_evictable == (None if memory is None else 90)


def test_a_guest_brings_no_prefill(engine: LoadStats) -> None:
    report(engine, None, MemoryStats(), num_running_reqs=1)
    engine.sent.send("guest", 0)
    load = engine.load(CACHE)
    assert (load.waiting, load.waiting_blocks, load.prefill_tokens_queued) == (1, 0, 0)


def idle() -> EngineLoad:
    return from_stock(SchedulerStats(), CACHE, [])


def test_an_idle_scheduler_is_an_empty_load() -> None:
    load = idle()
    assert (load.running, load.waiting, load.prefill_tokens_queued) == (0, 0, 0)
    assert (load.blocks_free, load.blocks_uncompressed, load.waiting_blocks) == (100, 0, 0)
    assert with_unseen(load, []) == load


def test_blocks_of_compressed_and_other_requests_add_up_to_the_held_ones() -> None:
    stats = SchedulerStats(num_running_reqs=2, kv_cache_usage=0.5)
    memory = MemoryStats(
        compressed_blocks=30, growth_blocks=7, kept_tokens=10, original_tokens=40,
        evictable_blocks=60, recomputed_tokens=9,
    )  # fmt: skip
    load = from_adakv(from_stock(stats, CACHE, []), memory)
    assert (load.blocks_free, load.blocks_compressed, load.blocks_uncompressed) == (50, 30, 20)
    assert (load.blocks_evictable, load.blocks_reserved_growth) == (50, 7)
    assert (load.achieved_compression, load.recomputed_tokens) == (0.25, 9)


def test_waiting_blocks_of_a_stock_scheduler_are_unknown_during_a_prefill() -> None:
    stats = SchedulerStats(num_running_reqs=1, num_waiting_reqs=1)
    assert from_stock(stats, CACHE, [320, 640]).waiting_blocks is None
    assert with_unseen(from_stock(stats, CACHE, [320, 640]), [320]).waiting_blocks is None
