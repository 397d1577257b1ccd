"""What an engine tells about its load while a step has not ended yet."""

from types import SimpleNamespace
from typing import Any

from vllm.v1.metrics.stats import SchedulerStats

from adakv_worker.stats import MemoryStats
from serving.vllm_host import VllmHost
from serving.vllm_load import LoadStats


def host(stats: SchedulerStats, **prompts: int) -> VllmHost:
    """A host whose scheduler last told `stats`, with requests of these prompt lengths."""
    states = {
        name: SimpleNamespace(prompt_len=tokens, is_prefilling=True)
        for name, tokens in prompts.items()
    }
    cache = SimpleNamespace(num_gpu_blocks=101, block_size=32)
    engine: Any = SimpleNamespace(
        vllm_config=SimpleNamespace(cache_config=cache),
        output_processor=SimpleNamespace(request_states=states),
        engine_core=None,
    )
    told = LoadStats(on_proof=lambda proof: None)
    told.note(stats, 0)
    app: Any = None
    return VllmHost(engine, app, told)


def test_requests_that_no_statistics_know_count_at_once() -> None:
    # The first two ran and waited when the step began; the third came while it computes.
    stats = SchedulerStats(num_running_reqs=1, num_waiting_reqs=1, kv_cache_usage=0.2)
    MemoryStats(waiting_blocks=10, queued_prefill_tokens=320).attach(stats)
    load = host(stats, running=3200, waiting=320, fresh=640).load()
    assert load.waiting == 2
    assert load.waiting_blocks == 10 + 20
    assert load.prefill_tokens_queued == 320 + 640


def test_stock_vllm_tells_the_prompts_of_all_that_are_not_started() -> None:
    load = host(SchedulerStats(), first=320, second=640).load()
    # An idle engine has begun the first.
    assert (load.running, load.waiting) == (1, 1)
    assert (load.blocks_free, load.waiting_blocks) == (90, 20)
    assert load.prefill_tokens_queued == 960


def test_without_requests_nothing_is_held() -> None:
    stats = SchedulerStats(num_running_reqs=1, kv_cache_usage=0.5)
    MemoryStats(compressed_blocks=50, evictable_blocks=30).attach(stats)
    load = host(stats).load()
    assert (load.running, load.waiting, load.blocks_free) == (0, 0, 100)
    assert (load.blocks_compressed, load.blocks_evictable) == (0, 30)
