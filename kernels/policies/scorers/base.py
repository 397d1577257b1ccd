"""The contract of a scorer."""

from typing import Protocol, runtime_checkable

from torch import Tensor

from adakv_serve.kernels.policies.observation import Observation


@runtime_checkable
class Scorer(Protocol):
    """Function from an observation to a score for each entry: equal inputs, equal scores.

    Implement it as a frozen dataclass whose fields are its parameters, `window_tokens` among them.
    A scorer that reads keys, values and attention in parts (`kernels.paging.entries`,
    `kernels.policies.attention`) takes bounded memory for every model and prompt.
    """

    @property
    def query_span_tokens(self) -> int:
        """Queries at the end of the prompt that `score` reads; 0 for none."""
        ...

    @property
    def window_tokens(self) -> int:
        """Most recent entries, which always stay."""
        ...

    def score(self, observation: Observation) -> Tensor:
        """Return scores [H, n - window_tokens] float32 of the entries before the window.

        The highest scores stay. Scores are finite and comparable between the heads of a layer.
        """
        ...


@runtime_checkable
class RaggedScorer(Scorer, Protocol):
    """A scorer that scores heads of different lengths at once.

    On a GPU the host then starts a few kernels for all heads of all layers, instead of for each.
    """

    def score_ragged(self, observation: Observation) -> Tensor:
        """Return scores [H, n - window_tokens] float32 as `score` does; n is the longest head's.

        What is behind a head's end may be anything.

        Args:
            observation: its keys and values have `lens`.
        """
        ...
