"""Selections while decoding, when heads hold different numbers of entries."""

from collections.abc import Sequence

import torch
from torch import Tensor

from adakv_serve.kernels.blocks import SINK_TOKENS
from adakv_serve.kernels.policies.head_allocations.uniform import UniformHeads
from adakv_serve.kernels.policies.layer_budgets.uniform import UniformLayers
from adakv_serve.kernels.policies.observation import Observation
from adakv_serve.kernels.policies.policy import LARGEST_SCORE, Policy, Scored
from adakv_serve.kernels.policies.scorers.sink_recency import SinkRecencyScorer
from adakv_serve.kernels.policies.top import top_mask
from adakv_serve.kernels.transfer import sent

# Above every score, and still finite when multiplied by a weight.
_ALWAYS = 2 * LARGEST_SCORE


def with_sinks(scored: Scored, sink_tokens: int = SINK_TOKENS) -> Scored:
    """Return scores [..., m] that put the first `sink_tokens` entries of each head on top."""
    scores = scored.scores.clone()
    scores[..., :sink_tokens] = _ALWAYS
    return scored._replace(scores=scores)


def score_heads(policy: Policy, heads: Sequence[Observation]) -> Scored:
    """Return scores [H, m] of a layer whose heads hold different entries; m is the longest head's.

    Sinks are on top. Columns behind a head's last entry are -inf.

    Args:
        heads: one observation for each head, as a layer of one head.
    """
    scored = [with_sinks(policy.score(head)) for head in heads]
    scores = _padded([one.scores for one in scored], float("-inf"))
    weights = [one.weights for one in scored if one.weights is not None]
    return Scored(scores, _padded(weights, 1.0) if weights else None)


def score_ragged(policy: Policy, observation: Observation, lens: Tensor) -> Scored:
    """Return scores [H, m] as `score_heads` does, in one call.

    Args:
        observation: H heads of different lengths.
        lens: [H], their entries.
    """
    scores = with_sinks(Scored(policy.score_ragged(observation), None)).scores
    position = torch.arange(scores.shape[-1], device=scores.device)
    before_window = lens[:, None] - policy.scorer.window_tokens
    return Scored(scores.masked_fill(position >= before_window, float("-inf")), None)


def stacked_layers(layers: Sequence[Scored]) -> Scored:
    """Return the scores [H, m] of L layers, of different m, as [L, H, m] padded with -inf."""
    scores = _padded([layer.scores[None] for layer in layers], float("-inf"))
    weights = [layer.weights[None] for layer in layers if layer.weights is not None]
    return Scored(scores, _padded(weights, 1.0) if weights else None)


def _padded(parts: Sequence[Tensor], value: float) -> Tensor:
    longest = max(part.shape[-1] for part in parts)
    wide = [
        torch.nn.functional.pad(part, (0, longest - part.shape[-1]), value=value) for part in parts
    ]
    return torch.cat(wide)


def reallocate(policy: Policy, scored: Scored, lens: Tensor, keep_tokens: int) -> Tensor:
    """Return kept [L, H, n] bool with exactly L * H * `keep_tokens` entries set.

    n is the number of entries of the longest head. Windows stay, and as many sinks of each head as
    `keep_tokens` has room for beside the window. If the policy allots a head or a layer more
    entries than it has, others get the rest.

    Args:
        scored: [L, H, n - window_tokens], see `score_heads`.
        lens: [L, H], entries of each head.

    Raises:
        ValueError: there are too few entries, or `keep_tokens` is below the window.
    """
    window = policy.scorer.window_tokens
    before_window = lens.long() - window
    scores, weights = scored
    sinks = before_window.clamp(max=min(SINK_TOKENS, max(0, keep_tokens - window)))
    totals = fitted(
        policy.totals(scores, keep_tokens),
        sinks.sum(dim=-1).tolist(),
        before_window.sum(dim=-1).tolist(),
    )
    older = policy.head_allocation.allocate(scores, totals) & (scores > float("-inf"))
    older |= _best_of_rest(scores, older, totals)
    if policy.second_stage is not None and weights is not None:
        older = policy.second_stage.reselect(older, scores, weights)
    kept = torch.nn.functional.pad(older, (0, window))
    position = torch.arange(kept.shape[-1], device=kept.device)
    recent = (position >= before_window[..., None]) & (position < lens[..., None])
    return kept | recent


def keep_recent(lens: Tensor, keep_tokens: int) -> Tensor:
    """Return kept [L, H, n] bool without scores: the sinks and the most recent entries.

    It keeps as many entries as `reallocate`; if a head has too few, others get the rest.

    Args:
        lens: [L, H], entries of each head.
    """
    position = torch.arange(int(lens.max()), device=lens.device, dtype=torch.float32)
    scores = position.expand(*lens.shape, -1).masked_fill(
        position >= lens[..., None], float("-inf")
    )
    policy = Policy(SinkRecencyScorer(), UniformLayers(), UniformHeads())
    return reallocate(policy, with_sinks(Scored(scores, None)), lens, keep_tokens)


def fitted(wanted: Sequence[int], least: Sequence[int], most: Sequence[int]) -> list[int]:
    """Return numbers near `wanted`, with the same sum, that lie within `least` and `most`.

    The difference of a clipped number is spread evenly over the others.

    Raises:
        ValueError: no numbers within `least` and `most` have the sum of `wanted`.
    """
    total = sum(wanted)
    if not sum(least) <= total <= sum(most):
        raise ValueError(f"cannot keep {total} of {sum(most)} entries, {sum(least)} at least")
    given = [max(low, min(want, high)) for want, low, high in zip(wanted, least, most, strict=True)]
    while missing := total - sum(given):
        step, ends = (1, most) if missing > 0 else (-1, least)
        movable = [i for i, end in enumerate(ends) if given[i] != end]
        share = -(-abs(missing) // len(movable))
        left = abs(missing)
        for i in movable:
            moved = min(share, abs(ends[i] - given[i]), left)
            given[i] += step * moved
            left -= moved
    return given


def _best_of_rest(scores: Tensor, kept: Tensor, totals: Sequence[int]) -> Tensor:
    """Return a mask of the best entries that are not kept, as many as each total lacks."""
    layers = scores.shape[0]
    missing = sent(totals, scores.device) - kept.view(layers, -1).sum(dim=-1)
    rest = scores.masked_fill(kept, float("-inf")).view(layers, -1)
    return top_mask(rest, missing).view_as(kept)
