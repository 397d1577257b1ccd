from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from kernels.policies.attention import observed_attention, pool
from kernels.policies.observation import Observation


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
    def query_span_tokens(self) -> int:
        return self.window_tokens

    def score(self, observation: Observation) -> Tensor:
        scores = observed_attention(observation, self.window_tokens, self.group_reduction)
        return pool(scores, self.kernel_size, self.pooling)
