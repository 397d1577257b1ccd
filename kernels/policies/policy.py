"""A policy: scorer, layer budget, head allocation, and CriticalKV's second stage."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from adakv_serve.kernels.policies.observation import Observation
from adakv_serve.kernels.policies.projected_values import ProjectedValues
from adakv_serve.kernels.policies.scorers.base import RaggedScorer, Scorer

# Largest magnitude of a score: sinks get higher ones, and products of scores stay finite.
LARGEST_SCORE = 1e18


class LayerBudget(Protocol):
    """Split of the budget over layers.

    needs_scores: whether a layer's share depends on the scores of all layers.
    """

    needs_scores: ClassVar[bool]

    def totals(
        self, shape: tuple[int, int, int], quota: int, scores: Tensor | None = None
    ) -> list[int]:
        """Return how many entries each of L layers keeps; they sum to L * H * quota.

        Args:
            shape: L, H, m: layers, heads, entries before the window.
            quota: entries per head on average.
            scores: [L, H, m]; may be None if `needs_scores` is False.
        """
        ...


class HeadAllocation(Protocol):
    """Split of a layer's entries over its heads."""

    def allocate(self, scores: Tensor, totals: list[int]) -> Tensor:
        """Return a bool mask of scores [L, H, m] with exactly `totals[l]` entries in layer l."""
        ...


class Scored(NamedTuple):
    """Scores of the entries before the window.

    scores: [..., H, n - window_tokens].
    weights: [..., H, n - window_tokens] of the second stage; None without one.
    """

    scores: Tensor
    weights: Tensor | None


class Selection(NamedTuple):
    """Entries that a request keeps.

    kept: [L, H, n] bool.
    lens: [L, H] int32, counts of `kept`.
    """

    kept: Tensor
    lens: Tensor


@dataclass(frozen=True)
class Policy:
    """Function from observations to the entries that stay: equal inputs, equal selections."""

    scorer: Scorer
    layer_budget: LayerBudget
    head_allocation: HeadAllocation
    second_stage: ProjectedValues | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.scorer, Scorer) or isinstance(self.scorer, type):
            raise TypeError(
                f"{self.scorer!r} is no scorer: it needs query_span_tokens, window_tokens and "
                "score(observation), as in kernels/policies/scorers/base.py, and is an instance"
            )

    def score(self, observation: Observation) -> Scored:
        """Return the scores of one layer, all of them finite.

        NaN becomes the lowest score: caches of 16 bits may overflow.

        Raises:
            ValueError: the scorer returned scores of another shape than [H, n - window_tokens].
        """
        scores = self.scorer.score(observation)
        before_window = observation.num_tokens - self.scorer.window_tokens
        expected = (observation.num_kv_heads, before_window)
        if scores.shape != expected:
            raise ValueError(
                f"{type(self.scorer).__name__}.score returned {list(scores.shape)}: "
                f"expected [heads, entries before the window] = {list(expected)}"
            )
        scores = _finite(scores)
        if self.second_stage is None:
            return Scored(scores, None)
        weights = self.second_stage.weights(observation, scores.shape[-1])
        return Scored(scores, _finite(weights))

    @property
    def scores_ragged(self) -> bool:
        """Whether `score_ragged` can be called.

        A subclass that changes `score` must change `score_ragged` too: until then it has none.
        """
        if self.second_stage is not None or not isinstance(self.scorer, RaggedScorer):
            return False
        return _definer(self.scorer, "score") is _definer(self.scorer, "score_ragged")

    def score_ragged(self, observation: Observation) -> Tensor:
        """Return the finite scores [H, n - window_tokens] of heads of different lengths.

        Args:
            observation: its keys and values have `lens`; n is the longest head's.
        """
        assert isinstance(self.scorer, RaggedScorer)
        return _finite(self.scorer.score_ragged(observation))

    def select(self, observations: Sequence[Observation], keep_tokens: int) -> Selection:
        """Select `keep_tokens` entries per head on average, the window included.

        The total is exactly L * H * min(keep_tokens, n), for every split.

        Args:
            observations: one for each layer, in order.

        Raises:
            ValueError: `keep_tokens` is below the scorer's window, or the layers do not match.
        """
        n = observations[0].num_tokens
        if any(layer.keys.shape[:2] != observations[0].keys.shape[:2] for layer in observations):
            raise ValueError("all layers must have the same number of heads and entries")
        if keep_tokens >= n:
            return _everything(observations)
        return self.allocate(stacked([self.score(layer) for layer in observations]), keep_tokens)

    def allocate(self, scored: Scored, keep_tokens: int) -> Selection:
        """Select as `select` does, from the scores [L, H, n - window_tokens] of all layers.

        Raises:
            ValueError: `keep_tokens` is below the scorer's window.
        """
        kept = self.allocate_layers(scored, self.totals(scored.scores, keep_tokens))
        return Selection(kept, kept.sum(dim=-1, dtype=torch.int32))

    def totals(self, scores: Tensor, keep_tokens: int) -> list[int]:
        """Return how many of scores [L, H, n - window_tokens] each layer keeps.

        Raises:
            ValueError: `keep_tokens` is below the scorer's window.
        """
        layers, heads, entries = scores.shape
        return self.layer_budget.totals((layers, heads, entries), self._quota(keep_tokens), scores)

    def layer_totals(self, shape: tuple[int, int, int], keep_tokens: int) -> list[int] | None:
        """Return `totals` from the shape [L, H, m] of scores alone; None if they need scores.

        Raises:
            ValueError: `keep_tokens` is below the scorer's window.
        """
        quota = self._quota(keep_tokens)
        return None if self.layer_budget.needs_scores else self.layer_budget.totals(shape, quota)

    def allocate_layers(self, scored: Scored, totals: list[int]) -> Tensor:
        """Return kept [K, H, n] bool of K layers: the window, and `totals` [K] entries before it.

        Args:
            scored: scores [K, H, n - window_tokens].
            totals: those of `totals` or `layer_totals` that belong to these layers.
        """
        scores, weights = scored
        older = self.head_allocation.allocate(scores, totals)
        if self.second_stage is not None and weights is not None:
            older = self.second_stage.reselect(older, scores, weights)
        recent = older.new_ones((*older.shape[:2], self.scorer.window_tokens))
        return torch.cat((older, recent), dim=-1)

    def _quota(self, keep_tokens: int) -> int:
        window = self.scorer.window_tokens
        if keep_tokens < window:
            raise ValueError(
                f"keep_tokens={keep_tokens} is below window_tokens={window}: "
                "raise the budget or lower the window"
            )
        return keep_tokens - window


def _definer(scorer: Scorer, name: str) -> type:
    """Return the class that defines a scorer's method."""
    return next(base for base in type(scorer).__mro__ if name in vars(base))


def _finite(scores: Tensor) -> Tensor:
    most = LARGEST_SCORE
    return scores.nan_to_num(nan=-most, posinf=most, neginf=-most).clamp_(-most, most)


def stacked(layers: Sequence[Scored]) -> Scored:
    """Return the scores [H, m] of K layers as [K, H, m]."""
    weights = [layer.weights for layer in layers if layer.weights is not None]
    return Scored(
        torch.stack([layer.scores for layer in layers]), torch.stack(weights) if weights else None
    )


def _everything(observations: Sequence[Observation]) -> Selection:
    first = observations[0]
    shape = (len(observations), first.num_kv_heads, first.num_tokens)
    kept = torch.ones(shape, dtype=torch.bool, device=first.keys.device)
    return Selection(kept, kept.sum(dim=-1, dtype=torch.int32))


def check_selection(selection: Selection, keep_tokens: int, window_tokens: int) -> None:
    """Assert what `Policy.select` promises of its result."""
    kept, lens = selection
    layers, heads, n = kept.shape
    assert torch.equal(kept.sum(dim=-1), lens.long()), "lens are not the counts"
    assert int(lens.sum()) == layers * heads * min(keep_tokens, n), "the total is not conserved"
    recent = kept[..., max(0, n - window_tokens) :]
    assert bool(recent.all()), "the window is not kept"
