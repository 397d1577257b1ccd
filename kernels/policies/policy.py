"""A compression policy: scorer x layer budget x head allocation, and CriticalKV's second stage."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from kernels.policies.observation import Observation
from kernels.policies.projected_values import ProjectedValues
from kernels.policies.scorers.base import Scorer

# Scores are held below this, so that others can be put above them, and products stay finite.
LARGEST_SCORE = 1e18


class LayerBudget(Protocol):
    """needs_scores: whether one layer's share depends on the scores of all."""

    needs_scores: ClassVar[bool]

    def totals(
        self, shape: tuple[int, int, int], quota: int, scores: Tensor | None = None
    ) -> list[int]:
        """Entries to keep in each layer of scores of `shape` [L, H, m].

        The sum is L * H * quota: `quota` for each head on average.
        """
        ...


class HeadAllocation(Protocol):
    def allocate(self, scores: Tensor, totals: list[int]) -> Tensor:
        """Bool mask of scores [L, H, m] with exactly `totals` [L] set in each layer."""
        ...


class Scored(NamedTuple):
    """Scores [..., H, n - window_tokens], and the weights of the second stage, if there is one."""

    scores: Tensor
    weights: Tensor | None


class Selection(NamedTuple):
    """What a request keeps: kept [L, H, n] bool, lens [L, H] int32 its counts."""

    kept: Tensor
    lens: Tensor


@dataclass(frozen=True)
class Policy:
    """Decides which entries of a cache stay. Pure: equal observations, equal selections."""

    scorer: Scorer
    layer_budget: LayerBudget
    head_allocation: HeadAllocation
    second_stage: ProjectedValues | None = None

    def score(self, observation: Observation) -> Scored:
        """Return what `allocate` needs of one layer, all of it finite.

        What is no number counts as the least: a model's cache may hold some (overflows in 16 bits),
        and an entry that none can be compared with is no reason to keep others.
        """
        scores = _finite(self.scorer.score(observation))
        if self.second_stage is None:
            return Scored(scores, None)
        weights = self.second_stage.weights(observation, scores.shape[-1])
        return Scored(scores, _finite(weights))

    def select(self, observations: Sequence[Observation], keep_tokens: int) -> Selection:
        """Keeps `keep_tokens` entries for each (layer, head) on average, the window included.

        The total is exactly L * H * min(keep_tokens, n), however it is split.

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
        """`select` from the scores [L, H, n - window_tokens] of all layers.

        Raises:
            ValueError: `keep_tokens` is below the scorer's window.
        """
        kept = self.allocate_layers(scored, self.totals(scored.scores, keep_tokens))
        return Selection(kept, kept.sum(dim=-1, dtype=torch.int32))

    def totals(self, scores: Tensor, keep_tokens: int) -> list[int]:
        """What each layer keeps of scores [L, H, n - window_tokens], the window left out.

        Raises:
            ValueError: `keep_tokens` is below the scorer's window.
        """
        layers, heads, entries = scores.shape
        return self.layer_budget.totals((layers, heads, entries), self._quota(keep_tokens), scores)

    def layer_totals(self, shape: tuple[int, int, int], keep_tokens: int) -> list[int] | None:
        """`totals` before there are scores [L, H, m] of `shape`; None if they decide it.

        Raises:
            ValueError: `keep_tokens` is below the scorer's window.
        """
        quota = self._quota(keep_tokens)
        return None if self.layer_budget.needs_scores else self.layer_budget.totals(shape, quota)

    def allocate_layers(self, scored: Scored, totals: list[int]) -> Tensor:
        """Kept [K, H, n] bool: `totals` [K] of scores [K, H, n - window_tokens], and the window.

        For some layers at a time, with `layer_totals`.
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


def _finite(scores: Tensor) -> Tensor:
    most = LARGEST_SCORE
    return scores.nan_to_num(nan=-most, posinf=most, neginf=-most).clamp_(-most, most)


def stacked(layers: Sequence[Scored]) -> Scored:
    """The layers' scores [H, m] as [K, H, m]."""
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
    """Asserts every promise of `Policy.select` on its result."""
    kept, lens = selection
    layers, heads, n = kept.shape
    assert torch.equal(kept.sum(dim=-1), lens.long()), "lens are not the counts"
    assert int(lens.sum()) == layers * heads * min(keep_tokens, n), "the total is not conserved"
    recent = kept[..., max(0, n - window_tokens) :]
    assert bool(recent.all()), "the window is not kept"
