from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from kernels.attention import mean_window_attention, pool, window_attention
from kernels.observation import Observation


@dataclass(frozen=True)
class WindowScorer:
    """SnapKV (2404.14469): mean attention that the last prompt queries pay to each entry.

    Reduced over the query group first, then pooled over positions, as FFY0/AdaKV does.

    window_tokens: size of the observation window; its entries are always kept.
    kernel_size, pooling: smoothing over positions.
    group_reduction: how the G query heads of a KV head become one score.
    """

    needs_values: ClassVar[bool] = False
    window_tokens: int = 32
    kernel_size: int = 7
    pooling: Literal["max", "avg", "none"] = "max"
    group_reduction: Literal["mean", "max"] = "mean"

    @property
    def query_span_tokens(self) -> int:
        return self.window_tokens

    def score(self, observation: Observation) -> Tensor:
        window = self.window_tokens
        if self.group_reduction == "mean":
            paged = observation.paged_keys
            scores = mean_window_attention(
                observation.grouped_queries(window),
                observation.keys if paged is None else paged,
                observation.scale,
                observation.num_tokens,
            )
        else:
            attention = window_attention(observation, window)[..., :-window]
            scores = attention.mean(dim=2).amax(dim=1)
        return pool(scores, self.kernel_size, self.pooling)
