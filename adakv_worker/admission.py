"""Whether a request may start: how much the running ones will still grow, in plain Python."""

from collections import deque
from collections.abc import Iterable
from typing import NamedTuple


class Life(NamedTuple):
    """A request from now on: the blocks that it holds, and the tokens that it will still append."""

    blocks: int
    tokens_to_come: int


def peak_blocks(lives: Iterable[Life], block_size: int) -> int:
    """Most blocks that the requests hold together, each growing by a token per step to its end.

    Blocks are filled evenly on average, so that growth is counted in tokens; after Past-Future
    scheduling (2507.10150), which sizes a batch by its future instead of its present.
    """
    peak = held = 0
    for count, life in enumerate(sorted(lives, key=lambda life: -life.tokens_to_come), start=1):
        # When this one ends, those that last longer are still there.
        held += life.blocks
        peak = max(peak, held + -(-count * life.tokens_to_come // block_size))
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
