"""Entries as formats of few bits would give them back, and engines whose pages simulate them."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from adakv_serve.evals.answering.engine import ForcedEngine
from adakv_serve.evals.answering.rounding import ROUNDINGS, Rounding, int4, rounded_pages
from adakv_serve.evals.choice import Choice, Outcome
from adakv_serve.evals.samples import Sample, Tokens
from adakv_serve.kernels.paging.paged_cache import compact
from tests.adakv_worker.engines import prompt

SAMPLE = Sample("task", "1", "1", "", (), "")
TOKENS = Tokens(prompt(300, seed=5), prompt(12, seed=6), 2)
CHOICE = Choice("ada_snapkv", tokens=200)


def _entries(seed: int, scale: float) -> Tensor:
    return torch.randn(20, 64, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize("rounding", ROUNDINGS.values(), ids=ROUNDINGS.keys())
@given(seed=st.integers(0, 1000), scale=st.sampled_from([0.0, 1e-3, 1.0, 1e3]))
def test_an_entry_is_off_by_half_a_step_at_most_in_each_rotated_number(
    rounding: Rounding, seed: int, scale: float
) -> None:
    entries = _entries(seed, scale)
    off = (rounding.apply(entries) - entries).norm(dim=-1)
    # A rotation spreads an entry's numbers over at most their norm, to both sides.
    spread = 2 * entries.norm(dim=-1) / (2**rounding.bits - 2)
    assert (off <= 64**0.5 * (spread + 2e-6)).all()
    assert (off > 0).all() or scale == 0.0


def test_a_dimension_that_is_large_costs_the_others_little_in_four_bits() -> None:
    entries = _entries(0, 1.0)
    entries[:, 3] *= 20
    off = (int4(entries) - entries)[:, torch.arange(64) != 3].abs().mean()
    least, most = entries.aminmax(dim=-1, keepdim=True)
    step = (most - least) / 15
    plain = ((entries / step).round() * step - entries)[:, torch.arange(64) != 3].abs().mean()
    assert off < plain / 2


def test_a_rotation_needs_a_power_of_two() -> None:
    with pytest.raises(ValueError, match="power of two, and heads have 96"):
        int4(torch.ones(1, 96))


def test_compaction_is_as_before_after_the_context() -> None:
    before = compact.path("cpu")
    with rounded_pages(ROUNDINGS["int4"]):
        assert compact.path("cpu") is not before
    assert compact.path("cpu") is before


@pytest.fixture(scope="module")
def outcomes(in_process: None, gqa_model: Path) -> dict[str | None, Outcome]:
    """The same choice under each rounding."""
    found = {}
    for rounding in (None, *ROUNDINGS):
        engine = ForcedEngine(
            gqa_model, 1024, 32 << 20, skip_tokenizer_init=True, page_rounding=rounding
        )
        found[rounding] = engine.outcomes(SAMPLE, TOKENS, [CHOICE])[CHOICE]
        engine.close()
    return found


def test_fewer_bits_change_answers_more(outcomes: dict[str | None, Outcome]) -> None:
    assert {outcome.kept_tokens for outcome in outcomes.values()} == {200}
    by_bits = [outcomes[name].surprise for name in (None, "int8", "int4")]
    exact, off8, off4 = (torch.tensor(surprise) for surprise in by_bits)
    assert 0 < (off8 - exact).abs().sum() < (off4 - exact).abs().sum()
