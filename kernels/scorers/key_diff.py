from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.entries import parts
from kernels.observation import Observation


@dataclass(frozen=True)
class KeyDiffScorer:
    """KeyDiff (2504.15364): keeps keys that differ from the others.

    The score is the negative cosine similarity of a key to the mean of the unit keys of its head.
    """

    window_tokens: int = 0
    query_span_tokens: int = 0

    def score(self, observation: Observation) -> Tensor:
        keys, normalize = observation.keys, torch.nn.functional.normalize
        heads, n, dim = keys.shape
        anchor = torch.zeros((heads, 1, dim), device=keys.device)
        for _, part in parts(keys):
            anchor += normalize(part.float(), dim=-1).sum(dim=1, keepdim=True)
        anchor = normalize(anchor, dim=-1)
        similarity = torch.cat(
            [(normalize(part.float(), dim=-1) * anchor).sum(dim=-1) for _, part in parts(keys)],
            dim=1,
        )
        return -similarity[:, : n - self.window_tokens]
