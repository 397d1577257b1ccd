"""Scorers against the formulas of their papers, entry by entry."""

import math

import pytest
import torch
from torch import Tensor

from adakv_serve.kernels.policies.observation import Observation
from adakv_serve.kernels.policies.projected_values import ProjectedValues, projected_value_norms
from adakv_serve.kernels.policies.rotary import Rotary
from adakv_serve.kernels.policies.scorers.defensive import DefensiveScorer
from adakv_serve.kernels.policies.scorers.expected_attention import ExpectedAttentionScorer
from adakv_serve.kernels.policies.scorers.key_diff import KeyDiffScorer
from adakv_serve.kernels.policies.scorers.key_norm import KeyNormScorer
from adakv_serve.kernels.policies.scorers.random import RandomScorer
from adakv_serve.kernels.policies.scorers.redundancy import RedundancyScorer
from adakv_serve.kernels.policies.scorers.sink_recency import SinkRecencyScorer
from adakv_serve.kernels.policies.scorers.window_l2 import WindowL2Scorer

HEADS, GROUP, N, DIM, HIDDEN = 2, 3, 24, 8, 10
WINDOW = 6


@pytest.fixture
def observation() -> Observation:
    """Return one layer with as many queries as entries."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    weight = normal(HIDDEN, HEADS * GROUP * DIM)
    return Observation(
        normal(HEADS * GROUP, N, DIM), normal(HEADS, N, DIM), normal(HEADS, N, DIM), DIM**-0.5,
        Rotary(100.0 ** -(torch.arange(0, DIM, 2) / DIM)),
        lambda head: weight.chunk(HEADS, dim=1)[head], 0,
    )  # fmt: skip


def _projected_norm(observation: Observation, head: int, position: int) -> float:
    assert observation.output_weight is not None
    weight = observation.output_weight(head)
    norms = []
    for member in range(GROUP):
        start = member * DIM
        norms.append((weight[:, start : start + DIM] @ observation.values[head, position]).abs())
    return float(torch.stack(norms).sum(dim=1).mean())


def test_values_are_projected_by_their_heads_weights(observation: Observation) -> None:
    norms = projected_value_norms(observation)
    assert float(norms[1, 20]) == pytest.approx(_projected_norm(observation, 1, 20), rel=1e-5)


def _attention(observation: Observation, head: int, member: int, query: int) -> Tensor:
    """Probabilities over all positions of window query `query`."""
    row = observation.queries[head * GROUP + member, N - WINDOW + query]
    seen = N - WINDOW + query + 1
    logits = observation.keys[head, :seen] @ row * observation.scale
    return torch.cat((logits.softmax(0), torch.zeros(N - seen)))


def _rotation(rotary: Rotary, position: int) -> Tensor:
    matrix = torch.zeros((DIM, DIM))
    for pair, frequency in enumerate(rotary.inv_freq.tolist()):
        cos, sin = math.cos(position * frequency), math.sin(position * frequency)
        other = pair + DIM // 2
        matrix[pair, pair] = matrix[other, other] = cos
        matrix[pair, other], matrix[other, pair] = -sin, sin
    return matrix


@pytest.mark.parametrize("evicted", [0, 40])
def test_expected_attention(observation: Observation, evicted: int) -> None:
    scorer = ExpectedAttentionScorer(query_span_tokens=N, future_tokens=7, epsilon=0.1)
    assert observation.rotary is not None
    observation = observation._replace(seen_tokens=N + evicted if evicted else None)
    sinks, end = scorer.sink_tokens, N + evicted
    turn = torch.stack([_rotation(observation.rotary, end + step) for step in range(7)]).mean(dim=0)
    expected = torch.empty((HEADS, N - sinks))
    for head in range(HEADS):
        shares = []
        for member in range(GROUP):
            before = torch.stack(
                [
                    _rotation(observation.rotary, -(position + evicted))
                    @ observation.queries[head * GROUP + member, position]
                    for position in range(sinks, N)
                ]
            )
            mean, covariance = (
                turn @ before.mean(dim=0),
                turn @ torch.cov(before.T, correction=0) @ turn.T,
            )
            keys = observation.keys[head, sinks:]
            logits = [
                float(mean @ key * DIM**-0.5 + key @ covariance @ key / DIM / 2) for key in keys
            ]
            shares.append(torch.tensor(logits).softmax(dim=0))
        norms = observation.values[head, sinks:].norm(dim=-1)
        expected[head] = (torch.stack(shares).mean(dim=0) + 0.1) * norms
    scores = scorer.score(observation)
    torch.testing.assert_close(scores[:, sinks:], expected)
    assert bool((scores[:, :sinks] > expected.amax()).all())


def test_defensive(observation: Observation) -> None:
    m = N - WINDOW
    scorer = DefensiveScorer(window_tokens=WINDOW, secured_mass=0.6)
    scores = scorer.score(observation)
    worst, mean = torch.zeros((HEADS, m)), torch.zeros((HEADS, m))
    for head in range(HEADS):
        for member in range(GROUP):
            for query in range(WINDOW):
                row = _attention(observation, head, member, query)[:m]
                mean[head] += row / (GROUP * WINDOW)
                padded = torch.cat((torch.zeros(2), row, torch.zeros(2)))
                pooled = torch.stack([padded[i : i + 5].mean() for i in range(m)])
                worst[head] = worst[head].maximum(pooled * row.sum() / pooled.sum())
    worst = worst.maximum(worst.mean(dim=1, keepdim=True))
    norms = torch.tensor(
        [[_projected_norm(observation, head, i) for i in range(m)] for head in range(HEADS)]
    )
    expected = worst * norms / norms.sum(dim=0)
    for head in range(HEADS):
        mass = 1 - float(mean[head].sum())
        secured = []
        for position in mean[head].argsort(descending=True).tolist():
            if mass >= 0.6:
                break
            secured.append(position)
            mass += float(mean[head, position])
        others = [i for i in range(m) if i not in secured]
        assert 0 < len(secured) < m
        torch.testing.assert_close(scores[head, others], expected[head, others])
        assert bool((scores[head, secured] > expected.amax()).all())


def test_the_second_stage_ranks_by_the_norm_of_the_projected_value(
    observation: Observation,
) -> None:
    stage = ProjectedValues(first_stage_ratio=0.5, epsilon=0.01)
    scores = torch.rand((1, HEADS, N), generator=torch.Generator().manual_seed(5))
    kept = torch.zeros_like(scores, dtype=torch.bool)
    kept[0, 0, :9] = kept[0, 1, :4] = True
    weights = stage.weights(observation, N)
    mask = stage.reselect(kept, scores, weights[None])[0]
    for head, count in ((0, 9), (1, 4)):
        ranked = scores[0, head].argsort(descending=True).tolist()
        first, rest = ranked[: count // 2], ranked[count // 2 :]
        worth = {
            i: (float(scores[0, head, i]) + 0.01) * _projected_norm(observation, head, i)
            for i in rest
        }
        rest.sort(key=worth.__getitem__, reverse=True)
        expected = sorted(first + rest[: count - len(first)])
        assert mask[head].nonzero()[:, 0].tolist() == expected


def test_key_scorers(observation: Observation) -> None:
    norms, diffs = KeyNormScorer().score(observation), KeyDiffScorer().score(observation)
    for head in range(HEADS):
        unit = [key / key.norm() for key in observation.keys[head]]
        anchor = torch.stack(unit).mean(dim=0)
        for position in range(N):
            key = observation.keys[head, position]
            assert norms[head, position] == pytest.approx(-float(key.norm()), rel=1e-5)
            cosine = float(unit[position] @ anchor / anchor.norm())
            assert diffs[head, position] == pytest.approx(-cosine, abs=1e-5)


def test_squared_attention(observation: Observation) -> None:
    m = N - WINDOW
    scores = WindowL2Scorer(window_tokens=WINDOW, kernel_size=3).score(observation)
    for head in range(HEADS):
        total = torch.zeros(m)
        for member in range(GROUP):
            for query in range(WINDOW):
                total += _attention(observation, head, member, query)[:m] ** 2
        pooled = torch.stack([total[max(0, i - 1) : i + 2].max() for i in range(m)])
        torch.testing.assert_close(scores[head], pooled)


@pytest.mark.parametrize("compared", [4096, 7])
def test_redundancy(observation: Observation, compared: int) -> None:
    m = N - WINDOW
    scorer = RedundancyScorer(
        WINDOW, kernel_size=3, importance_share=0.3, least_similarity=0.1, spared_share=0.2,
        compared_tokens=compared,
    )  # fmt: skip
    rows = range(max(0, m - compared), m)
    scores = scorer.score(observation)
    for head in range(HEADS):
        unit = [key / key.norm() for key in observation.keys[head, :m]]
        sums = [0.0] * m
        for row in rows:
            cosines = [float(unit[row] @ unit[i]) if i != row else 0.0 for i in range(m)]
            similar = [i for i in range(m) if cosines[i] > 0.1]
            for i in set(range(m)) - set(similar[len(similar) - 3 :]):
                sums[i] += cosines[i]
        redundancy = (torch.tensor(sums) / len(rows)).softmax(dim=0)
        members = [
            torch.stack([_attention(observation, head, g, q)[:m] for q in range(WINDOW)]).mean(0)
            for g in range(GROUP)
        ]
        best = torch.stack(members).amax(dim=0)
        pooled = torch.stack([best[max(0, i - 1) : i + 2].max() for i in range(m)])
        torch.testing.assert_close(scores[head], 0.3 * pooled - 0.7 * redundancy)


def test_random_scores_are_each_heads_own(observation: Observation) -> None:
    scorer = RandomScorer(window_tokens=WINDOW)
    together = scorer.score(observation)
    assert not torch.equal(together[0], together[1])
    # While decoding, each head is an observation of its own.
    keys = observation.keys[:1]
    first, second = (
        scorer.score(observation._replace(keys=keys, first_head=head)) for head in (0, 1)
    )
    assert not torch.equal(first, second)
    assert torch.equal(first, scorer.score(observation._replace(keys=keys)))


def test_random_scores_are_each_layers_own_and_each_evictions(observation: Observation) -> None:
    scorer = RandomScorer(window_tokens=WINDOW)
    drawn = [
        scorer.score(observation._replace(layer=layer, seen_tokens=seen))
        for layer, seen in ((0, None), (1, None), (0, 100), (0, 101))
    ]
    for number, scores in enumerate(drawn):
        assert not any(torch.equal(scores, other) for other in drawn[:number])


def test_sinks_come_first_and_then_the_most_recent(observation: Observation) -> None:
    for row in SinkRecencyScorer(sink_tokens=2).score(observation):
        order = row.argsort(descending=True, stable=True).tolist()
        assert order == [0, 1, *range(N - 1, 1, -1)]


def test_neighbouring_pairs_are_rotated_as_complex_numbers() -> None:
    frequencies = torch.tensor([0.3, 0.05])
    x = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(1))
    positions = torch.tensor([0, 5, -7])
    turned = Rotary(frequencies, interleaved=True).rotate(x, positions)
    numbers = torch.view_as_complex(x[..., :4].reshape(2, 3, 2, 2).contiguous())
    turn = torch.polar(torch.ones(3, 2), positions[:, None] * frequencies)
    torch.testing.assert_close(turned[..., :4], torch.view_as_real(numbers * turn).flatten(-2))
    assert torch.equal(turned[..., 4:], x[..., 4:])
