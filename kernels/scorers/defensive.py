from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kernels.attention import pool, window_attention
from kernels.observation import Observation


@dataclass(frozen=True)
class DefensiveScorer:
    """Guards against the worst case, after the idea of DefensiveKV (2510.13334).

    Our own reading of it, not checked against the authors' code.

    An entry's worth is the largest attention that any query of the window and of the group pays to
    it, floored by a share of its head's mean, so that an entry that looked idle in the window is
    not written off altogether.

    prior: share of the head's mean score that every entry keeps.
    """

    needs_values: ClassVar[bool] = False
    window_tokens: int = 32
    kernel_size: int = 7
    prior: float = 0.1

    @property
    def query_span_tokens(self) -> int:
        return self.window_tokens

    def score(self, observation: Observation) -> Tensor:
        attention = window_attention(observation, self.window_tokens)[..., : -self.window_tokens]
        worst = attention.amax(dim=(1, 2))
        floor = self.prior * worst.mean(dim=-1, keepdim=True)
        return pool(worst.maximum(floor), self.kernel_size, "max")
