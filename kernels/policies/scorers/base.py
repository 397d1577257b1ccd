"""The contract of a scorer."""

from typing import Protocol

from torch import Tensor

from kernels.policies.observation import Observation


class Scorer(Protocol):
    """Gives every cached entry of a layer a worth. Pure: the same observation, the same scores.

    One that goes through keys, values and attention in parts (`kernels.paging.entries`,
    `kernels.policies.attention`) takes the same memory for every model and prompt.
    """

    @property
    def query_span_tokens(self) -> int:
        """Queries that must be captured before the end of the prompt; 0 for none."""
        ...

    @property
    def window_tokens(self) -> int:
        """Most recent entries that are always kept."""
        ...

    def score(self, observation: Observation) -> Tensor:
        """Scores [H, n - window_tokens] float32 of the entries before the window.

        Higher is kept. Finite, comparable between the heads of a layer.
        """
        ...
