from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import avg_pool1d

from kernels.attention import window_attention
from kernels.observation import Observation
from kernels.projected_values import projected_value_norms


@dataclass(frozen=True)
class DefensiveScorer:
    """DefensiveKV (2510.13334): guards against the worst case instead of averaging over it.

    An entry's worth is the largest attention that any query of the window and of the group pays to
    it and its neighbours, but no less than its head's mean, times its share in the norms of the
    heads' projected values. Entries that together with the window carry `secured_mass` of a head's
    mean attention come before all others. (The authors' code cuts these off at the head's even
    share of the budget; here the joint selection does, in the order of the mean attention.)
    """

    needs_values: ClassVar[bool] = True
    window_tokens: int = 32
    kernel_size: int = 5
    secured_mass: float = 0.9

    @property
    def query_span_tokens(self) -> int:
        return self.window_tokens

    def score(self, observation: Observation) -> Tensor:
        attention = window_attention(observation, self.window_tokens)[..., : -self.window_tokens]
        worst = self._smoothed(attention).amax(dim=(1, 2))
        worst = worst.maximum(worst.mean(dim=-1, keepdim=True))
        norms = projected_value_norms(observation)[:, : worst.shape[1]]
        scores = worst * norms / norms.sum(dim=0, keepdim=True)
        mean = attention.mean(dim=(1, 2))
        return scores.where(~self._secured(mean), scores.amax() + 1.0 + mean)

    def _smoothed(self, attention: Tensor) -> Tensor:
        """Averages [H, G, w, m] over neighbouring positions; each query's total stays."""
        rows = attention.flatten(0, 2)[:, None]
        pooled = avg_pool1d(rows, self.kernel_size, 1, self.kernel_size // 2)
        totals = pooled.sum(-1, keepdim=True).clamp(min=1e-30)
        pooled = pooled * (rows.sum(-1, keepdim=True) / totals)
        return pooled.view_as(attention)

    def _secured(self, mean: Tensor) -> Tensor:
        """Marks, of mean attention [H, m], the largest that reach the mass with the window's."""
        order = mean.sort(dim=-1, descending=True, stable=True)
        window_mass = 1 - mean.sum(dim=-1, keepdim=True)
        before = order.values.cumsum(dim=-1) - order.values + window_mass
        return (before < self.secured_mass).scatter(-1, order.indices, before < self.secured_mass)
