from dataclasses import dataclass

from torch import Tensor

from adakv_serve.kernels.paging.entries import lengths, per_entry
from adakv_serve.kernels.policies.observation import Observation


@dataclass(frozen=True)
class KeyNormScorer:
    """Negative L2 norm of the key (2406.11430): keys of small norm draw attention."""

    window_tokens: int = 0
    query_span_tokens: int = 0

    def score(self, observation: Observation) -> Tensor:
        norms = per_entry(observation.keys, lengths)
        return -norms[:, : observation.num_tokens - self.window_tokens]
