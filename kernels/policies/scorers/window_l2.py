from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from kernels.policies.attention import observed_attention, pool
from kernels.policies.observation import Observation


@dataclass(frozen=True)
class WindowL2Scorer:
    """KV-Compress (2410.00161): squared attention, summed over the window and the query group.

    Squared attention without pooling prefers single spikes; pooling is essential for retrieval.
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
