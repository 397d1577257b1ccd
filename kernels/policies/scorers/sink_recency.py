from dataclasses import dataclass

import torch
from torch import Tensor

from adakv_serve.kernels.policies.observation import Observation


@dataclass(frozen=True)
class SinkRecencyScorer:
    """StreamingLLM (2309.17453): the first `sink_tokens` entries and the most recent ones."""

    sink_tokens: int = 4
    window_tokens: int = 0
    query_span_tokens: int = 0

    def score(self, observation: Observation) -> Tensor:
        n = observation.num_tokens
        recency = torch.arange(n, dtype=torch.float32, device=observation.keys.device)
        recency[: self.sink_tokens] = n
        scores = recency[: n - self.window_tokens]
        return scores.expand(observation.num_kv_heads, -1)
