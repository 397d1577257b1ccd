from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from adakv_serve.kernels.policies.attention import observed_attention, pool
from adakv_serve.kernels.policies.observation import Observation


@dataclass(frozen=True)
class WindowScorer:
    """SnapKV (2404.14469): mean attention of the last queries to each entry.

    It is reduced over the query group, then pooled over positions, as in FFY0/AdaKV.

    window_tokens: size of the observation window.
    kernel_size: positions that are pooled.
    pooling: how positions are pooled.
    group_reduction: how the G query heads of a head become one score.
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

    def score_ragged(self, observation: Observation) -> Tensor:
        # Entries of 0 behind a head's end pool as its end does.
        return self.score(observation)
