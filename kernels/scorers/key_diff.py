from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kernels.observation import Observation


@dataclass(frozen=True)
class KeyDiffScorer:
    """KeyDiff (2504.15364): keeps keys that differ from the others.

    The score is the negative cosine similarity of a key to the mean of the unit keys of its head.
    """

    needs_values: ClassVar[bool] = False
    window_tokens: int = 0
    query_span_tokens: int = 0

    def score(self, observation: Observation) -> Tensor:
        unit = torch.nn.functional.normalize(observation.keys.float(), dim=-1)
        anchor = unit.mean(dim=1, keepdim=True)
        similarity = torch.nn.functional.cosine_similarity(unit, anchor, dim=-1)
        return -similarity[:, : observation.num_tokens - self.window_tokens]
