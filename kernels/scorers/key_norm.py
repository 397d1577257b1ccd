from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kernels.observation import Observation


@dataclass(frozen=True)
class KeyNormScorer:
    """Small key norms draw attention (2406.11430): the score is the negative L2 norm of the key."""

    needs_values: ClassVar[bool] = False
    window_tokens: int = 0
    query_span_tokens: int = 0

    def score(self, observation: Observation) -> Tensor:
        norms = observation.keys.float().norm(dim=-1)
        return -norms[:, : observation.num_tokens - self.window_tokens]
