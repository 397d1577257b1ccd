from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from kernels.attention import pool, window_attention
from kernels.observation import Observation


@dataclass(frozen=True)
class WindowScorer:
    """SnapKV (2404.14469): mean attention that the last prompt queries pay to each entry.

    Reduced over the query group first, then pooled over positions, as FFY0/AdaKV does.

    window_tokens: size of the observation window; its entries are always kept.
    kernel_size, pooling: smoothing over positions.
    group_reduction: how the G query heads of a KV head become one score.
    """

    window_tokens: int = 32
    kernel_size: int = 7
    pooling: Literal["max", "avg", "none"] = "max"
    group_reduction: Literal["mean", "max"] = "mean"

    @property
    def needs_values(self) -> bool:
        return False

    @property
    def query_span_tokens(self) -> int:
        return self.window_tokens

    def score(self, observation: Observation) -> Tensor:
        attention = window_attention(observation, self.window_tokens)
        per_query_head = attention[..., : -self.window_tokens].mean(dim=2)
        if self.group_reduction == "mean":
            scores = per_query_head.mean(dim=1)
        else:
            scores = per_query_head.amax(dim=1)
        return pool(scores, self.kernel_size, self.pooling)
