from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.entries import lengths, parts
from kernels.observation import Observation


@dataclass(frozen=True)
class KeyNormScorer:
    """Small key norms draw attention (2406.11430): the score is the negative L2 norm of the key."""

    window_tokens: int = 0
    query_span_tokens: int = 0

    def score(self, observation: Observation) -> Tensor:
        norms = torch.cat([lengths(part) for _, part in parts(observation.keys)], dim=1)
        return -norms[:, : observation.num_tokens - self.window_tokens]
