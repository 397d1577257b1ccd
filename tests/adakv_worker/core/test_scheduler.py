"""Random lives of many requests in the real scheduler, with a worker that only answers."""

from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from adakv_worker.core.figures import evictable_blocks
from adakv_worker.core.plan import UNBOUNDED, Life
from adakv_worker.core.request import Phase
from adakv_worker.messages import MemoryStats
from adakv_worker.statistics_carrier import figures_of
from tests.adakv_worker.fake_worker import CoreConfig, Fake

OPTIONS = st.sampled_from(
    [
        {}, {}, {"adakv_policy": "full"}, {"adakv_budget_tokens": 200}, {"adakv_keep_ratio": 0.3},
        {"adakv_decode_budget_tokens": 70, "adakv_decode_interval_tokens": 32},
        {"adakv_policy": "streaming_llm", "adakv_decode_budget_tokens": 64},
    ]
)  # fmt: skip
ACTIONS = st.lists(
    st.one_of(
        st.tuples(
            st.just("add"), st.integers(1, 700), st.integers(1, 200), st.integers(0, 3), OPTIONS
        ),
        st.tuples(
            st.just("arrive"),
            st.integers(100, 600),
            st.integers(1, 80),
            st.integers(81, 120),
            st.booleans(),
        ),
        st.tuples(st.just("step")),
        st.tuples(st.just("step")),
        st.tuples(st.just("abort"), st.integers(0, 9)),
    ),
    max_size=40,
)


@pytest.mark.parametrize("in_flight", [0, 1], ids=["synchronous", "asynchronous"])
@settings(max_examples=60, deadline=None)
@given(actions=ACTIONS)
def test_random_lives_lose_no_block(small: CoreConfig, in_flight: int, actions: list[Any]) -> None:
    fake = Fake(small, in_flight)
    total = fake.free_blocks
    for name, *values in actions:
        getattr(fake, name)(*values)
    fake.finish()
    assert fake.free_blocks == total
    assert not fake.manager.requests
    assert not fake.scheduler._proofs
    assert not fake.scheduler._to_take_up


@pytest.mark.parametrize("in_flight", [0, 1], ids=["synchronous", "asynchronous"])
def test_outputs_longer_than_the_ones_before_are_preempted_and_end(
    small: CoreConfig, in_flight: int
) -> None:
    fake = Fake(small, in_flight)
    for seed in range(70):
        fake.add(40, 300, seed, {}, stops_after=2)
    fake.finish()
    for seed in range(6):
        fake.add(600, 300, seed, {"adakv_budget_tokens": 200}, stops_after=300)
    fake.finish()
    # Each had its prompt, and some of its answer; of the prompt some blocks may still be there.
    assert 0 < fake.memory_stats().recomputed_tokens < len(fake.preempted) * 900


def test_outputs_as_long_as_the_ones_before_are_not_preempted(small: CoreConfig) -> None:
    fake = Fake(small, in_flight=0)
    for seed in range(6):
        fake.add(600, 300, seed, {"adakv_budget_tokens": 200})
    fake.finish()
    assert not fake.preempted
    assert fake.memory_stats().recomputed_tokens == 0


@pytest.mark.parametrize("in_flight", [0, 1], ids=["synchronous", "asynchronous"])
def test_a_request_that_comes_with_its_cache_takes_only_slabs(
    small: CoreConfig, in_flight: int
) -> None:
    fake = Fake(small, in_flight)
    free = fake.scheduler.kv_cache_manager.block_pool.get_num_free_blocks
    before = free()
    name = fake.arrive(600, 10, 12, with_state=True)
    fake.step()
    plan = fake.manager.requests[name].plan
    # 64 entries a head and ten new ones: not the 20 blocks of its tokens.
    assert before - free() == plan.blocks_at(610) <= 4
    request = fake.scheduler.requests[name]
    assert (request.num_prompt_tokens, request.num_output_tokens) == (600, 10 + (not in_flight))
    fake.finish()
    # It was to write 12 in all.
    assert request.num_output_tokens == 12
    assert free() == before


def test_a_request_that_comes_without_its_cache_computes_all_its_tokens(small: CoreConfig) -> None:
    fake = Fake(small, in_flight=0)
    name = fake.arrive(600, 10, 12, with_state=False)
    # More than one step's tokens.
    fake.step()
    fake.step()
    assert fake.scheduler.requests[name].num_computed_tokens == 610
    assert fake.manager.requests[name].phase is Phase.RESERVED
    # All but the last, which is computed for the first time.
    assert fake.memory_stats().recomputed_tokens == 609
    fake.finish()


def test_what_comes_with_its_cache_waits_for_room(small: CoreConfig) -> None:
    fake = Fake(small, in_flight=0)
    fake.add(1000, 24, 1, {"adakv_policy": "full"})
    fake.step()
    names = [fake.arrive(600, 10, 300, with_state=True) for _ in range(6)]
    fake.step()
    running = {request.request_id for request in fake.scheduler.running}
    assert not running >= set(names)
    fake.finish()


@pytest.mark.parametrize("in_flight", [0, 1], ids=["synchronous", "asynchronous"])
@pytest.mark.parametrize("length", [3, 60, 600])
def test_a_bounded_request_never_holds_more_than_its_bound(
    small: CoreConfig, in_flight: int, length: int
) -> None:
    fake = Fake(small, in_flight)
    free = fake.scheduler.kv_cache_manager.block_pool.get_num_free_blocks
    before = free()
    bound = {"adakv_decode_budget_tokens": 70, "adakv_decode_interval_tokens": 40}
    fake.add(length, 400, 0, bound)
    request = fake.scheduler.requests["r0"]
    fake.step()
    while request.num_output_tokens < 3:
        fake.step()
    held = []
    while fake.scheduler.has_unfinished_requests():
        held.append(before - free())
        evictions = fake.scheduler._proofs.get("r0").decode_evictions
        fake.step()
    # 110 entries for each head, and as many as fit a page but one, in blocks of 32.
    assert max(held) == (110 + 31 + 31) // 32
    # The last of its 400 tokens is never cached.
    assert evictions == (min(length, 64) + 399 - 70) // 40
    fake.finish()
    assert free() == before


def test_bounded_requests_are_admitted_by_their_bounds(small: CoreConfig) -> None:
    fake = Fake(small, in_flight=0)
    for seed in range(6):
        bound = {"adakv_decode_budget_tokens": 70, "adakv_decode_interval_tokens": 40}
        fake.add(100, 800, seed, bound)
    most = 0
    while fake.scheduler.has_unfinished_requests():
        fake.step()
        most = max(most, len(fake.scheduler.running))
    # Unbounded, one would come to more than half of the pool.
    assert most == 6
    assert not fake.preempted


def test_the_statistics_count_compressed_memory(small: CoreConfig) -> None:
    fake = Fake(small, in_flight=0)
    for seed in range(4):
        fake.add(600, 40, seed, {"adakv_budget_tokens": 200} if seed else {"adakv_policy": "full"})
    compressed: list[str] = []
    while len(compressed) < 1:
        fake.step()
        requests = fake.manager.requests.items()
        compressed = [name for name, request in requests if request.phase is Phase.COMPRESSED]
    stats = fake.scheduler.make_stats()
    assert stats is not None
    # As they cross to the front end.
    figures = figures_of(MsgpackDecoder(SchedulerStats).decode(MsgpackEncoder().encode(stats)))
    assert figures is not None
    memory = figures.memory
    assert memory.compressed_blocks == sum(len(fake.manager.req_to_blocks[r]) for r in compressed)
    assert memory.kept_tokens == 200 * len(compressed)
    assert memory.original_tokens == 600 * len(compressed)
    # A prompt of 600 takes 19 blocks, and 8 slabs where it compresses.
    waiting = [request.request_id for request in fake.scheduler.waiting]
    assert memory.waiting_blocks == 27 * len(waiting)
    assert fake.manager.admission.growth_blocks() > 0
    # The compressed prompts' full blocks.
    assert evictable_blocks(fake.manager) == 18 * len(compressed)
    fake.finish()
    assert fake.memory_stats()._replace(evictable_blocks=0) == MemoryStats()


def test_a_short_request_starts_where_the_others_overflow_only_later(small: CoreConfig) -> None:
    full = {"adakv_policy": "full"}
    started = {}
    for scheduler in (Scheduler, None):
        fake = Fake(small, 0, scheduler)
        for seed in range(3):
            fake.add(200, 800, seed, full)
        fake.step()
        fake.add(150, 10, 3, {})
        fake.add(40, 10, 4, full)
        before = fake.steps
        fake.finish()
        started[scheduler] = [fake.starts[name] - before for name in ("r3", "r4")]
    assert started[None] == started[Scheduler] == [1, 1]


class Traffic(NamedTuple):
    """One request: `gap` steps after the one before; its answer ends by itself after `answer`."""

    gap: int
    length: int
    max_tokens: int
    answer: int
    options: dict[str, Any]


TRAFFIC = st.lists(
    st.builds(
        Traffic, st.integers(0, 20), st.integers(1, 700), st.integers(1, 250),
        st.integers(1, 250), OPTIONS,
    ),
    min_size=1, max_size=25,
)  # fmt: skip
# A request begins after at most so many times the steps in which stock vLLM ends it and those that
# its answer may take.
MOST_TIMES = 2.0


@settings(max_examples=80, deadline=None)
@given(traffic=TRAFFIC)
def test_no_request_waits_for_much_longer_than_under_stock_vllm(
    small: CoreConfig, traffic: list[Traffic]
) -> None:
    fakes = [Fake(small, 0, scheduler) for scheduler in (Scheduler, None)]
    arrived: dict[str, int] = {}
    for fake in fakes:
        for seed, request in enumerate(traffic):
            for _ in range(request.gap):
                fake.step()
            arrived[f"r{seed}"] = fake.steps
            fake.add(request.length, request.max_tokens, seed, request.options, request.answer)
        fake.finish()
    stock, ours = fakes
    for (name, step), request in zip(arrived.items(), traffic, strict=True):
        begun, ended = ours.starts[name] - step, stock.ends[name] - step
        assert begun <= MOST_TIMES * (ended + request.max_tokens), (name, begun, ended)


def test_a_prompt_that_has_room_starts_whole_where_its_slabs_have_none_for_long(
    small: CoreConfig,
) -> None:
    fake = Fake(small, 0)
    fake.add(700, 300, 0, {"adakv_policy": "full"})
    fake.step()
    # 20 blocks and 8 slabs, of which 25 are free and ever fewer.
    fake.add(620, 12, 1, {"adakv_budget_tokens": 200})
    while "r1" not in fake.ends or "r1" in fake.scheduler.requests:
        fake.step()
    assert fake.starts["r1"] <= 2 + 12 + 1
    fake.finish()


def test_lengths_are_learnt_from_answers_that_ended_by_themselves(small: CoreConfig) -> None:
    fake = Fake(small, 0)
    for seed in range(70):
        fake.add(40, 1, seed, {})
        fake.add(40, 300, seed, {}, stops_after=20)
    fake.finish()
    life = Life(0, UNBOUNDED, 1, answered=0, left=300, due=0, max_tokens=300)
    assert fake.manager.admission.answer_lengths.one_to_come(life) == (20, 0)
    for seed in range(70):
        fake.add(40, 300, seed, {}, stops_after=200)
        fake.step()
        fake.abort(0)
    fake.finish()
    # A request whose client leaves is no evidence of how long answers are.
    assert fake.manager.admission.answer_lengths.one_to_come(life) == (20, 0)
    # Unless the front end has found a stop string.
    for seed in range(70):
        fake.add(40, 300, seed, {}, stops_after=200)
        (request,) = fake.scheduler.requests.values()
        request.sampling_params.stop = ["the end"]
        while request.num_output_tokens < 3:
            fake.step()
        fake.abort(0)
    fake.finish()
    assert fake.manager.admission.answer_lengths.one_to_come(life) == (3, 0)
