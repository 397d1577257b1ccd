from dataclasses import dataclass

import torch
from torch import Tensor

from adakv_serve.kernels.paging.entries import lengths, parts, per_entry
from adakv_serve.kernels.policies.observation import Observation


@dataclass(frozen=True)
class KeyDiffScorer:
    """KeyDiff (2504.15364): keys that differ from the others score high.

    The score is the negative cosine similarity of a key to the mean of its head's unit keys.
    """

    window_tokens: int = 0
    query_span_tokens: int = 0

    def score(self, observation: Observation) -> Tensor:
        keys = observation.keys
        heads, n, dim = keys.shape
        anchor = torch.zeros((heads, 1, dim), device=keys.device)
        for _, part in parts(keys):
            anchor += (1 / _lengths(part))[:, None] @ part.float()
        anchor = torch.nn.functional.normalize(anchor, dim=-1)

        def similarity(part: Tensor) -> Tensor:
            return (part.float() @ anchor.transpose(1, 2))[..., 0] / _lengths(part)

        return -per_entry(keys, similarity)[:, : n - self.window_tokens]


def _lengths(part: Tensor) -> Tensor:
    return lengths(part).clamp_(min=1e-12)
