"""Evictions while decoding: counts, and selections among heads of different lengths."""

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adakv_serve.kernels.blocks import SINK_TOKENS, DecodeBound, entries_after, most_entries
from adakv_serve.kernels.paging.entries import PagedEntries
from adakv_serve.kernels.policies.observation import Observation
from adakv_serve.kernels.policies.policy import Scored
from adakv_serve.kernels.policies.presets import PRESETS, preset
from adakv_serve.kernels.policies.reselection import (
    fitted,
    keep_recent,
    reallocate,
    score_heads,
    score_ragged,
    with_sinks,
)
from adakv_serve.kernels.policies.scorers.window import WindowScorer
from tests.kernels.paging import in_pages


@given(st.integers(1, 60), st.integers(1, 40), st.integers(0, 60), st.integers(0, 300))
def test_the_counts_are_those_of_a_step_by_step_count(
    budget: int, interval: int, kept: int, decoded: int
) -> None:
    kept = min(kept, budget)
    bound = DecodeBound(budget, interval)
    entries, most = kept, kept
    evicted = False
    for _ in range(decoded):
        entries, evicted = (budget if evicted else entries) + 1, False
        if entries == budget + interval:
            evicted = True
        most = max(most, entries)
    assert bound.entries(kept, decoded) == entries_after(kept, decoded, bound) == entries
    assert most_entries(kept, decoded, bound) == most <= bound.most_tokens
    assert bound.evicts(kept, decoded) == evicted or decoded == 0
    further = bound.until_next(kept, decoded)
    assert further > 0
    assert bound.evicts(kept, decoded + further)
    assert not any(bound.evicts(kept, decoded + step) for step in range(1, further))


@given(st.data())
def test_clipped_numbers_keep_their_sum_and_limits(data: st.DataObject) -> None:
    most = data.draw(st.lists(st.integers(0, 50), min_size=1, max_size=8))
    least = [data.draw(st.integers(0, high)) for high in most]
    wanted = [data.draw(st.integers(0, 60)) for _ in most]
    if not sum(least) <= sum(wanted) <= sum(most):
        with pytest.raises(ValueError, match="cannot keep"):
            fitted(wanted, least, most)
        return
    got = fitted(wanted, least, most)
    assert sum(got) == sum(wanted)
    assert all(low <= one <= high for low, one, high in zip(least, got, most, strict=True))
    if all(low <= one <= high for low, one, high in zip(least, wanted, most, strict=True)):
        assert got == wanted


def test_a_scorer_that_changes_only_its_scores_is_asked_head_by_head() -> None:
    @dataclass(frozen=True)
    class Backwards(WindowScorer):
        def score(self, observation: Observation) -> Tensor:
            return super().score(observation).flip(-1)

    @dataclass(frozen=True)
    class Narrow(WindowScorer):
        window_tokens: int = 8

    policy = preset("ada_snapkv")
    assert policy.scores_ragged
    assert replace(policy, scorer=Narrow()).scores_ragged
    assert not replace(policy, scorer=Backwards()).scores_ragged


@pytest.mark.parametrize("name", [name for name in PRESETS if preset(name).scores_ragged])
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_heads_of_different_lengths_score_together_as_alone(name: str, data: st.DataObject) -> None:
    policy = preset(name)
    window = policy.scorer.window_tokens
    spread = st.integers(window + SINK_TOKENS, window + 60)
    lens = data.draw(st.lists(spread, min_size=1, max_size=6))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 100)))
    queries = torch.randn((2 * len(lens), window, 32), generator=generator)
    keys = torch.randn((len(lens), max(lens), 32), generator=generator)
    paged = in_pages(keys, 16, generator)
    counts = torch.tensor(lens, dtype=torch.int32)
    together = Observation(queries, paged._replace(lens=counts), paged, 0.2)
    alone = [
        Observation(queries[2 * head : 2 * head + 2], one, one, 0.2)
        for head, entries in enumerate(lens)
        for one in (PagedEntries(paged.pool, paged.pages[head : head + 1], entries),)
    ]
    got, wanted = score_ragged(policy, together, counts).scores, score_heads(policy, alone).scores
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("name", PRESETS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_the_total_is_conserved_for_heads_of_different_lengths(
    name: str, data: st.DataObject
) -> None:
    policy = preset(name)
    window = policy.scorer.window_tokens
    layers, heads = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))
    spread = st.integers(window + SINK_TOKENS, window + 60)
    lens = torch.tensor(
        [[data.draw(spread) for _ in range(heads)] for _ in range(layers)], dtype=torch.int32
    )
    mean = int(lens.sum()) // lens.numel()
    keep = data.draw(st.integers(max(window, 1), mean))
    seed = data.draw(st.integers(0, 100))
    shape = (layers, heads, int(lens.max()) - window)
    # Many ties, as pooled scores have.
    scores = torch.randint(0, 9, shape, generator=torch.Generator().manual_seed(seed)).float()
    empty = torch.arange(shape[-1]) >= (lens - window)[..., None]
    scored = with_sinks(Scored(scores.masked_fill(empty, float("-inf")), torch.ones(shape)))
    kept = reallocate(policy, scored, lens, keep)
    assert int(kept.sum()) == layers * heads * keep
    position = torch.arange(kept.shape[-1])
    assert not bool((kept & (position >= lens[..., None])).any())
    assert bool(kept[..., :SINK_TOKENS].all()) or keep < window + SINK_TOKENS
    recent = (position >= (lens - window)[..., None]) & (position < lens[..., None])
    assert bool(kept[recent].all())


@pytest.mark.parametrize("name", PRESETS)
def test_heads_of_one_length_keep_the_entries_that_a_prompt_keeps(name: str) -> None:
    policy = preset(name)
    n, keep = 200, 120
    m = n - policy.scorer.window_tokens
    generator = torch.Generator().manual_seed(3)
    scores = torch.rand((3, 2, m), generator=generator)
    scored = with_sinks(Scored(scores, torch.rand((3, 2, m), generator=generator)))
    lens = torch.full((3, 2), n, dtype=torch.int32)
    assert torch.equal(reallocate(policy, scored, lens, keep), policy.allocate(scored, keep).kept)


@pytest.mark.parametrize("keep", range(1, SINK_TOKENS + 2))
def test_without_scores_any_budget_is_kept(keep: int) -> None:
    lens = torch.tensor([[30, 12], [5, 40]], dtype=torch.int32)
    assert keep_recent(lens, keep).sum(dim=-1).tolist() == [[keep, keep], [keep, keep]]


def test_without_scores_the_sinks_and_the_most_recent_entries_stay() -> None:
    lens = torch.tensor([[30, 12]], dtype=torch.int32)
    kept = keep_recent(lens, 10)
    first, second = (row.nonzero()[:, 0].tolist() for row in kept[0])
    assert first == [*range(SINK_TOKENS), *range(24, 30)]
    assert second == [*range(SINK_TOKENS), *range(6, 12)]
    # A head that has too few entries leaves the rest to the other.
    assert keep_recent(lens, 15).sum(dim=-1).tolist() == [[18, 12]]
