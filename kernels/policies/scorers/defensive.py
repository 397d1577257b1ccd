from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d

from adakv_serve.kernels.policies.attention import attention_rows
from adakv_serve.kernels.policies.observation import Observation
from adakv_serve.kernels.policies.projected_values import projected_value_norms


@dataclass(frozen=True)
class DefensiveScorer:
    """DefensiveKV (2510.13334): the worst case over queries instead of the mean.

    A score is the largest attention that a query of the window pays to an entry and its neighbours,
    at least the head's mean of these, times the entry's share in the norms of the heads' projected
    values. Entries that together with the window carry `secured_mass` of a head's mean attention
    score above all others, in the order of their mean attention. The authors' code cuts these off
    at the head's even share of the budget; here the head allocation does.

    window_tokens: size of the observation window.
    kernel_size: positions that attention is averaged over.
    secured_mass: share of a head's attention, 0 to 1.
    """

    window_tokens: int = 32
    kernel_size: int = 5
    secured_mass: float = 0.9

    @property
    def query_span_tokens(self) -> int:
        return self.window_tokens

    def score(self, observation: Observation) -> Tensor:
        mean, worst = self._attention(observation)
        worst = worst.maximum(worst.mean(dim=-1, keepdim=True))
        norms = projected_value_norms(observation)[:, : worst.shape[1]]
        scores = worst * norms / norms.sum(dim=0, keepdim=True)
        return scores.where(~self._secured(mean), scores.amax() + 1.0 + mean)

    def _attention(self, observation: Observation) -> tuple[Tensor, Tensor]:
        """Return the mean and the largest smoothed attention [H, m] of the window's queries."""
        queries = observation.grouped_queries(self.window_tokens)
        shape = (observation.num_kv_heads, observation.num_tokens - self.window_tokens)
        mean, worst = queries.new_zeros((2, *shape), dtype=torch.float32)
        for head, _, attention in attention_rows(queries, observation.keys, observation.scale):
            older = attention[:, : shape[1]]
            mean[head] += older.sum(dim=0)
            torch.maximum(worst[head], self._smoothed(older).amax(dim=0), out=worst[head])
        return mean.div_(queries.shape[1] * self.window_tokens), worst

    def _smoothed(self, attention: Tensor) -> Tensor:
        """Return attention [r, m] averaged over neighbours; each query keeps its sum."""
        pooled = avg_pool1d(attention[:, None], self.kernel_size, 1, self.kernel_size // 2)[:, 0]
        totals = pooled.sum(-1, keepdim=True).clamp(min=1e-30)
        return pooled.mul_(attention.sum(-1, keepdim=True) / totals)

    def _secured(self, mean: Tensor) -> Tensor:
        """Return a mask of the largest mean attention [H, m] that, with the window, is the mass."""
        order = mean.sort(dim=-1, descending=True, stable=True)
        window_mass = 1 - mean.sum(dim=-1, keepdim=True)
        before = order.values.cumsum(dim=-1) - order.values + window_mass
        return (before < self.secured_mass).scatter(-1, order.indices, before < self.secured_mass)
