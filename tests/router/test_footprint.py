"""Footprints against the block arithmetic itself, and running quantiles of outputs."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adakv_serve.kernels.blocks import (
    DecodeBound,
    blocks_for_tokens,
    compressed_blocks_bound,
    kept_tokens,
)
from adakv_serve.router.footprint import Budget, Footprint, OutputQuantiles, predict, prefix_hashes

BLOCK = 32


@given(
    prompt=st.integers(1, 5000),
    output=st.integers(0, 2000),
    budget_tokens=st.integers(1, 1000),
    keep_ratio=st.floats(0, 1),
)
def test_a_footprint_holds_the_request_at_every_moment(
    prompt: int, output: int, budget_tokens: int, keep_ratio: float
) -> None:
    footprint = predict(prompt, output, Budget(budget_tokens, keep_ratio), BLOCK)
    assert footprint.steady_blocks <= footprint.peak_blocks
    assert footprint.peak_blocks >= blocks_for_tokens(prompt, BLOCK)
    full = predict(prompt, output, None, BLOCK)
    assert footprint.steady_blocks <= full.steady_blocks + 1
    kept = kept_tokens(prompt, budget_tokens, keep_ratio)
    if footprint != full:
        decoded = max(0, output - 1)
        assert footprint.steady_blocks == compressed_blocks_bound(kept, decoded, BLOCK)


def test_compression_frees_most_of_a_long_prompt() -> None:
    assert predict(3200, 100, None, BLOCK).steady_blocks == 104
    compressed = predict(3200, 100, Budget(256, 0.0), BLOCK)
    assert compressed.steady_blocks == blocks_for_tokens(256 + 99 + 31, BLOCK) == 13
    assert compressed.peak_blocks == 100 + blocks_for_tokens(256 + 31, BLOCK) == 109


def test_a_bounded_answer_takes_no_more_than_its_bound() -> None:
    budget = Budget(256, 0.0, DecodeBound(128, 64))
    long = predict(3200, 5000, budget, BLOCK)
    assert long.steady_blocks == blocks_for_tokens(128 + 64 + 31, BLOCK)
    assert long.peak_blocks == 100 + blocks_for_tokens(128 + 31, BLOCK)
    # A short prompt takes slabs, too, where its answer could outgrow the bound.
    short = predict(20, 5000, budget, BLOCK)
    assert short.peak_blocks == short.steady_blocks == long.steady_blocks
    limited = predict(20, 100, budget, BLOCK, most_output_tokens=150)
    assert limited == predict(20, 100, None, BLOCK)


def test_only_the_first_answer_to_a_prompt_is_compressed() -> None:
    one = predict(3200, 100, Budget(256, 0.0), BLOCK)
    four = predict(3200, 100, Budget(256, 0.0), BLOCK, answers=4)
    # The others share 99 blocks of the prompt, and have five more each at their end.
    assert four.steady_blocks == four.peak_blocks == one.steady_blocks + 99 + 3 * 5
    assert predict(3200, 100, None, BLOCK, answers=4).peak_blocks == 99 + 4 * 5
    assert four.output_tokens == 400


def test_all_answers_that_may_outgrow_their_bounds_are_compressed() -> None:
    budget = Budget(256, 0.0, DecodeBound(128, 64))
    one, four = (predict(3200, 100, budget, BLOCK, answers=answers) for answers in (1, 4))
    assert four.steady_blocks == 4 * one.steady_blocks
    assert four.peak_blocks == 99 + 4 * (one.peak_blocks - 99)


def test_a_footprint_has_all_answers_and_the_prompts_hashes() -> None:
    assert predict(100, 50, None, BLOCK, (1, 2), answers=3) == Footprint(9, 9, 100, 150, (1, 2))
    compressed = predict(3200, 100, Budget(256, 0.0), BLOCK, (1, 2), answers=2)
    assert compressed == Footprint(117, 117, 3200, 200, (1, 2))


def test_a_request_that_stays_uncompressed_has_that_footprint() -> None:
    short = predict(100, 50, Budget(256, 0.5), BLOCK)
    assert short == predict(100, 50, None, BLOCK)
    one_token = predict(3200, 1, Budget(256, 0.0), BLOCK, most_output_tokens=1)
    assert one_token == predict(3200, 1, None, BLOCK)
    with pytest.raises(ValueError, match="negative"):
        predict(10, -1, None, BLOCK)


@given(st.lists(st.integers(0, 5000), min_size=1, max_size=600), st.floats(0, 0.99))
def test_expected_outputs_are_quantiles_of_the_last_256(
    lengths: list[int], quantile: float
) -> None:
    outputs = OutputQuantiles()
    for length in lengths:
        outputs.note(length)
    recent = sorted(lengths[-256:])
    assert outputs.expected(None, quantile) == recent[int(quantile * len(recent))]


def test_outputs_older_than_the_last_256_are_forgotten() -> None:
    outputs = OutputQuantiles()
    for length in [*range(150, 300), *range(150)]:
        outputs.note(length)
    # 194 to 299, and 0 to 149.
    assert outputs.expected(None, 0.0) == 0
    assert outputs.expected(None, 149 / 256) == 149
    assert outputs.expected(None, 150 / 256) == 194
    assert outputs.expected(None) == 236
    assert outputs.expected(None, 1.0) == 299


def test_an_output_is_expected_to_end_at_max_tokens() -> None:
    outputs = OutputQuantiles(prior_tokens=300)
    assert outputs.expected(None) == 300
    assert outputs.expected(20) == 20
    outputs.note(10)
    assert outputs.expected(20) == 10


def test_equal_prefixes_have_equal_hashes_up_to_the_first_difference() -> None:
    rng = random.Random(1)
    prompt = [rng.randrange(50000) for _ in range(200)]
    other = [*prompt[:100], -1, *prompt[101:]]
    hashes, others = prefix_hashes(prompt, BLOCK), prefix_hashes(other, BLOCK)
    assert len(hashes) == 200 // BLOCK
    assert hashes[:3] == others[:3]
    assert not set(hashes[3:]) & set(others[3:])
    assert prefix_hashes(prompt[:31], BLOCK) == ()
