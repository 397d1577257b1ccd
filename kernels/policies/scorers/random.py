from dataclasses import dataclass

import torch
from torch import Tensor

from adakv_serve.kernels.policies.observation import Observation


@dataclass(frozen=True)
class RandomScorer:
    """Uniform random scores, as a control: equal for equal seed, layer and length on any device."""

    seed: int = 0
    window_tokens: int = 32
    query_span_tokens: int = 0

    def score(self, observation: Observation) -> Tensor:
        seed = self.seed * 100_003 + observation.layer + 10_007 * observation.first_head
        # Each eviction draws new scores; otherwise the same entries would survive all of them.
        generator = torch.Generator().manual_seed(seed + 1_000_003 * (observation.seen_tokens or 0))
        shape = (observation.num_kv_heads, observation.num_tokens - self.window_tokens)
        return torch.rand(shape, generator=generator).to(observation.keys.device)
