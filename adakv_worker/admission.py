"""Whether a request may start: how much the running ones will still grow, in plain Python."""

from collections import deque
from collections.abc import Iterable
from typing import NamedTuple


class Life(NamedTuple):
    """A request from now on: tokens that fill its blocks, and tokens that it will still append."""

    tokens: int
    tokens_to_come: int


def peak_tokens(lives: Iterable[Life]) -> int:
    """Most tokens that the requests hold together, each growing by one per step to its end.

    After Past-Future scheduling (2507.10150), which sizes a batch by its future, not its present.
    """
    peak = held = 0
    for count, life in enumerate(sorted(lives, key=lambda life: -life.tokens_to_come), start=1):
        # When this one ends, those that last longer are still there.
        held += life.tokens
        peak = max(peak, held + count * life.tokens_to_come)
    return peak


class OutputLengths:
    """How long outputs are: learnt from the last ones that ended.

    prior_tokens: the length that is assumed until one has.
    """

    def __init__(self, prior_tokens: int, remembered: int = 64) -> None:
        self._prior_tokens = prior_tokens
        self._ended: deque[int] = deque(maxlen=remembered)

    def note(self, tokens: int) -> None:
        self._ended.append(tokens)

    def to_come(self, generated: int, limit: int) -> int:
        """Expected tokens still to come after `generated`, at most `limit`."""
        longer = [tokens for tokens in self._ended or (self._prior_tokens,) if tokens > generated]
        # One that has outlived all the others goes on for as long again, as such things do.
        expected = sum(longer) // len(longer) - generated if longer else generated
        return min(expected, limit)
