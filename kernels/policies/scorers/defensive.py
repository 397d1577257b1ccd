from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d

from kernels.policies.attention import attention_rows
from kernels.policies.observation import Observation
from kernels.policies.projected_values import projected_value_norms


@dataclass(frozen=True)
class DefensiveScorer:
    """DefensiveKV (2510.13334): guards against the worst case instead of averaging over it.

    An entry's worth is the largest attention that any query of the window and of the group pays to
    it and its neighbours, but no less than its head's mean, times its share in the norms of the
    heads' projected values. Entries that together with the window carry `secured_mass` of a head's
    mean attention come before all others. (The authors' code cuts these off at the head's even
    share of the budget; here the joint selection does, in the order of the mean attention.)
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
        """Return mean and largest smoothed attention [H, m] that the window's queries pay."""
        queries = observation.grouped_queries(self.window_tokens)
        shape = (observation.num_kv_heads, observation.num_tokens - self.window_tokens)
        mean, worst = queries.new_zeros((2, *shape), dtype=torch.float32)
        for head, _, attention in attention_rows(queries, observation.keys, observation.scale):
            older = attention[:, : shape[1]]
            mean[head] += older.sum(dim=0)
            torch.maximum(worst[head], self._smoothed(older).amax(dim=0), out=worst[head])
        return mean.div_(queries.shape[1] * self.window_tokens), worst

    def _smoothed(self, attention: Tensor) -> Tensor:
        """Average [r, m] over neighbouring positions; each query's total stays."""
        pooled = avg_pool1d(attention[:, None], self.kernel_size, 1, self.kernel_size // 2)[:, 0]
        totals = pooled.sum(-1, keepdim=True).clamp(min=1e-30)
        return pooled.mul_(attention.sum(-1, keepdim=True) / totals)

    def _secured(self, mean: Tensor) -> Tensor:
        """Marks, of mean attention [H, m], the largest that reach the mass with the window's."""
        order = mean.sort(dim=-1, descending=True, stable=True)
        window_mass = 1 - mean.sum(dim=-1, keepdim=True)
        before = order.values.cumsum(dim=-1) - order.values + window_mass
        return (before < self.secured_mass).scatter(-1, order.indices, before < self.secured_mass)
