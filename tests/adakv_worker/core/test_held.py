"""Held caches in vLLM's block pool: always free, found by tokens, lost when overwritten."""

import numpy as np
import pytest

from tests.adakv_worker.core.held_pool import (
    BLOCKS,
    IDLE_S,
    MOST,
    MOST_BLOCKS,
    PATIENCE_S,
    Pool,
    tokens,
)


@pytest.fixture
def pool() -> Pool:
    return Pool()


@pytest.mark.parametrize(
    ("asked", "saved"),
    [
        ((1, 2, 3, 4, 5, 6, 7), 6),
        # The last token of the request is computed for its answer.
        ((1, 2, 3, 4, 5, 6), 5),
        ((1, 2, 3, 4, 5), 4),
        ((1, 2, 3, 4, 9, 9, 9), 4),
        # Below the floor there is nothing to cut back to.
        ((1, 2, 3, 9, 9, 9, 9), 0),
        ((1, 2, 3, 4), 0),
        ((), 0),
    ],
)
def test_a_cache_saves_the_common_tokens_from_its_floor_on(
    pool: Pool, asked: tuple[int, ...], saved: int
) -> None:
    held = pool.hold(tokens(1, 2, 3, 4, 5, 6), 2, floor=4)
    match = pool.held.find("a", tokens(*asked))
    assert (match.tokens if match else 0) == saved
    assert match is None or match.held is held


@pytest.mark.parametrize("common", [0, 1, 1023, 1024, 1025, 2048, 2500])
def test_long_prompts_are_compared_to_their_first_difference(pool: Pool, common: int) -> None:
    ids = np.arange(2500, dtype=np.int32)
    pool.hold(ids, 2)
    asked = np.append(ids, 7).astype(np.int32)
    asked[common:] += 1
    match = pool.held.find("a", asked)
    assert (match.tokens if match else 0) == common


def test_another_scope_finds_nothing(pool: Pool) -> None:
    pool.hold(tokens(1, 2, 3), 1, scope="tenant")
    assert pool.held.find("other", tokens(1, 2, 3, 4)) is None
    assert pool.held.find("tenant", tokens(1, 2, 3, 4)) is not None


def test_the_cache_that_saves_most_is_found(pool: Pool) -> None:
    pool.hold(tokens(1, 2, 3), 1)
    longer = pool.hold(tokens(1, 2, 3, 4, 5), 1)
    pool.hold(tokens(1, 2, 9, 9, 9, 9), 1)
    match = pool.held.find("a", tokens(1, 2, 3, 4, 5, 6))
    assert match is not None
    assert match.held is longer


def test_held_blocks_count_as_free_and_are_lost_when_they_are_taken(pool: Pool) -> None:
    held = pool.hold(tokens(1, 2, 3), 3)
    assert pool.pool.get_num_free_blocks() == BLOCKS - 1
    pool.pool.get_new_blocks(BLOCKS - 1)
    assert len(pool.held) == 0
    assert pool.held.take_gone() == [held.name]
    assert pool.held.dropped["reused"] == 1


def test_a_taken_cache_belongs_to_its_taker(pool: Pool) -> None:
    held = pool.hold(tokens(1, 2, 3), 3)
    taken = pool.held.take(held.name)
    assert pool.pool.get_num_free_blocks() == BLOCKS - 4
    pool.pool.get_new_blocks(BLOCKS - 4)
    assert all(block.ref_cnt == 1 for block in taken.blocks)
    assert pool.held.take_gone() == []
    # When its blocks are freed and used again, no cache is counted as lost.
    pool.pool.free_blocks(taken.blocks)
    pool.pool.get_new_blocks(3)
    assert pool.held.dropped["reused"] == 0


def test_the_least_recently_used_go_beyond_the_cap(pool: Pool) -> None:
    first, second = pool.hold(tokens(1), 9), pool.hold(tokens(2), 9)
    pool.hold(tokens(3), 9)
    assert first.name not in pool.held
    assert second.name in pool.held
    assert pool.held.blocks == 18
    for name in range(4, 4 + MOST):
        pool.hold(tokens(name), 1)
    assert len(pool.held) == MOST
    assert pool.held.dropped["cap"] == 3


def test_caches_of_named_sessions_are_kept_a_minute_longer(pool: Pool) -> None:
    named = pool.hold(tokens(1), 9, has_session=True)
    pool.now_s = 50.0
    other = pool.hold(tokens(2), 9)
    pool.hold(tokens(3), 9)
    assert (named.name in pool.held, other.name in pool.held) == (True, False)
    pool.now_s = 61.0
    pool.hold(tokens(4), 9)
    # A minute after its own use the others' later use counts again.
    pool.now_s = 130.0
    pool.hold(tokens(5), 9)
    assert named.name not in pool.held


def test_blocks_of_named_sessions_are_overwritten_later(pool: Pool) -> None:
    running = pool.pool.get_new_blocks(BLOCKS - 1 - 12)
    named = pool.hold(tokens(1), 4, has_session=True)
    first, second = pool.hold(tokens(2), 4), pool.hold(tokens(3), 4)
    for gone in (first, second, named):
        pool.held.next_step()
        pool.pool.get_new_blocks(4)
        assert pool.held.take_gone() == [gone.name]
    assert running


def test_named_sessions_stay_longer_in_the_hosts_memory(pool: Pool) -> None:
    pool = Pool(arrived_blocks=6)
    named = pool.arrive(tokens(1), 3, has_session=True)
    other = pool.arrive(tokens(2), 3)
    pool.arrive(tokens(3), 3)
    assert (named.name in pool.held, other.name in pool.held) == (True, False)
    pool.held.check()


def test_a_cache_for_which_nobody_comes_is_forgotten(pool: Pool) -> None:
    pool.hold(tokens(1), 1)
    pool.now_s = IDLE_S
    pool.hold(tokens(2), 1)
    pool.held.next_step()
    assert len(pool.held) == 2
    assert pool.held.find("a", tokens(1, 9)) is not None
    pool.now_s += 1.0
    # An engine without work takes no step, but a request must not bring it back.
    assert pool.held.find("a", tokens(1, 9)) is None
    pool.held.next_step()
    assert [one.token_ids.tolist() for one in pool.held] == [[2]]


def test_a_cache_is_no_younger_for_having_moved() -> None:
    pool = Pool(arrived_blocks=10)
    pool.arrive(tokens(2), 3)
    pool.arrive(tokens(1), 3, age_s=IDLE_S - 1.0)
    pool.now_s = 1.0
    pool.held.next_step()
    assert len(pool.held) == 2
    pool.now_s = 2.0
    assert pool.held.find("a", tokens(1, 9)) is None
    pool.held.next_step()
    assert [one.token_ids.tolist() for one in pool.held] == [[2]]
    pool.held.check()


def test_young_caches_are_left_alone_for_a_moment(pool: Pool) -> None:
    pool.hold(tokens(1), 3)
    pool.now_s += 0.4
    pool.hold(tokens(2), 5)
    assert pool.held.young_blocks() == 8
    pool.now_s += 0.2
    assert pool.held.young_blocks() == 5
    # A request waits for the older one.
    match = pool.held.find("a", tokens(1, 9))
    assert match is not None
    pool.held.refresh(match.held.name)
    assert pool.held.young_blocks() == 8
    pool.held.patient = False
    assert pool.held.young_blocks() == 0
    pool.held.patient = True
    pool.now_s += PATIENCE_S
    assert pool.held.young_blocks() == 0


def test_other_free_blocks_are_overwritten_first(pool: Pool) -> None:
    others = pool.pool.get_new_blocks(BLOCKS - 6)
    pool.hold(tokens(1), 5)
    # They are younger, so that vLLM alone would overwrite the held ones first.
    pool.pool.unpin_blocks(others, lambda _: None)
    for _ in range(8):
        pool.held.next_step()
        # A step takes no more than the reach.
        pool.pool.get_new_blocks(4)
        assert len(pool.held) == 1
    pool.held.next_step()
    pool.pool.get_new_blocks(8)
    assert len(pool.held) == 0


@pytest.mark.parametrize("host_blocks", [0, MOST_BLOCKS + 1])
def test_a_cache_that_is_too_large_to_be_held_takes_no_other_with_it(host_blocks: int) -> None:
    pool = Pool(host_blocks=host_blocks)
    others = [pool.hold(tokens(1), 9), pool.hold(tokens(2), 9)]
    large = pool.hold(tokens(3), MOST_BLOCKS + 1)
    assert list(pool.held)[:2] == others
    assert pool.held.take_parks() == [large.name] * (host_blocks > 0)
    assert pool.held.take_gone() == [large.name] * (host_blocks == 0)
    pool.held.check()


def test_a_reset_prefix_cache_has_no_held_caches_either(pool: Pool) -> None:
    pool.hold(tokens(1), 5)
    assert pool.pool.reset_prefix_cache()
    assert len(pool.held) == 0


def test_what_a_reset_forgets_is_not_copied_to_the_host() -> None:
    pool = Pool(host_blocks=7)
    held = pool.hold(tokens(1, 2), 3)
    pool.pool.get_new_blocks(BLOCKS - 1)
    pool.held.forget()
    assert (pool.held.take_parks(), pool.held.take_gone()) == ([], [held.name])


def test_caches_go_to_the_host_when_their_blocks_are_taken() -> None:
    pool = Pool(host_blocks=7)
    first, second = pool.hold(tokens(1, 2), 3), pool.hold(tokens(3, 4), 4)
    taken = pool.pool.get_new_blocks(BLOCKS - 1)
    assert pool.held.take_parks() == [first.name, second.name]
    assert pool.held.take_gone() == []
    match = pool.held.find("a", tokens(1, 2, 3))
    assert match is not None
    assert (match.held.source, match.held.size_blocks, match.tokens) == ("host", 3, 2)
    # The least recently used goes when another one comes.
    pool.held.refresh(first.name)
    pool.pool.free_blocks(taken)
    third = pool.hold(tokens(5), 2)
    pool.pool.get_new_blocks(BLOCKS - 1)
    assert pool.held.take_parks() == [third.name]
    assert pool.held.take_gone() == [second.name]
    pool.held.check()
    assert pool.held.take(first.name).parked_blocks == 3
    pool.held.check()


def test_a_cache_that_the_workers_have_not_begun_goes_back_to_the_host() -> None:
    pool = Pool(host_blocks=7)
    held = pool.hold(tokens(1, 2), 3)
    blocks = pool.pool.get_new_blocks(BLOCKS - 1)
    taken = pool.held.take(held.name)
    pool.held.expect("request", taken)
    assert pool.held.receive("request", blocks[:3]) == blocks[:3]
    assert held.name in pool.held
    pool.held.check()


def test_caches_from_other_replicas_have_memory_of_their_own() -> None:
    pool = Pool(host_blocks=3, arrived_blocks=7)
    here = pool.hold(tokens(9), 3)
    first, second = pool.arrive(tokens(1, 2), 4), pool.arrive(tokens(3, 4), 3)
    pool.pool.get_new_blocks(BLOCKS - 1)
    assert {one.name: one.source for one in pool.held} == {
        here.name: "host", first.name: "replica", second.name: "replica",
    }  # fmt: skip
    # The least recently used goes when another one comes, and one that never fits at once.
    pool.held.refresh(first.name)
    third, large = pool.arrive(tokens(5), 1), pool.arrive(tokens(6), 8)
    assert pool.held.take_gone() == [second.name, large.name]
    assert third.name in pool.held
    # One that the workers have not begun goes back.
    taken = pool.held.take(first.name)
    pool.held.expect("request", taken)
    pool.held.receive("request", [])
    assert pool.held.get(first.name).source == "replica"
    pool.held.check()
