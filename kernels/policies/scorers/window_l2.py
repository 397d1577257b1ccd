from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from adakv_serve.kernels.policies.attention import observed_attention, pool
from adakv_serve.kernels.policies.observation import Observation


@dataclass(frozen=True)
class WindowL2Scorer:
    """KV-Compress (2410.00161): squared attention, summed over the window and the query group.

    Without pooling, squares favour single spikes, and retrieval fails.

    window_tokens: size of the observation window.
    kernel_size: positions that are pooled.
    pooling: how positions are pooled.
    """

    window_tokens: int = 32
    kernel_size: int = 7
    pooling: Literal["max", "avg", "none"] = "max"

    @property
    def query_span_tokens(self) -> int:
        return self.window_tokens

    def score(self, observation: Observation) -> Tensor:
        scores = observed_attention(observation, self.window_tokens, "squares")
        return pool(scores, self.kernel_size, self.pooling)

    def score_ragged(self, observation: Observation) -> Tensor:
        # Entries of 0 behind a head's end pool as its end does.
        return self.score(observation)
