"""Whether a request may start: how much the running ones will still grow, in plain Python."""

import math
from collections import deque
from collections.abc import Iterable
from typing import NamedTuple


class Expected(NamedTuple):
    """Tokens still to come, on average, and their standard deviation."""

    tokens: int
    spread: float


class Life(NamedTuple):
    """A request from now on: tokens that fill its blocks, and those that it will still append.

    most_tokens: what it never exceeds, however many come; None where there is no such bound.
    """

    tokens: int
    to_come: Expected
    most_tokens: int | None = None

    @property
    def reaches_bound(self) -> bool:
        return self.most_tokens is not None and (
            self.tokens + self.to_come.tokens >= self.most_tokens
        )


def peak_tokens(lives: Iterable[Life]) -> int:
    """Most tokens that the requests hold together, each growing by one per step to its end.

    After Past-Future scheduling (2507.10150), which sizes a batch by its future, not its present.
    How long each goes on is uncertain: one standard deviation of the sum is added. One that comes
    to its bound counts with that until it ends.
    """
    peak = held = growing = 0
    variance = 0.0
    ordered = sorted(lives, key=lambda life: -life.to_come.tokens)
    for life in ordered:
        # When this one ends, those that last longer are still there.
        if life.reaches_bound:
            held += life.most_tokens or 0
        else:
            held += life.tokens
            growing += 1
            variance += life.to_come.spread**2
        peak = max(peak, held + growing * life.to_come.tokens + math.ceil(math.sqrt(variance)))
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

    def to_come(self, generated: int, limit: int) -> Expected:
        """What an output that has come to `generated` tokens will still bring, at most `limit`."""
        left = [
            min(tokens - generated, limit)
            for tokens in self._ended or (self._prior_tokens,)
            if tokens > generated
        ]
        if not left:
            # One that has outlived all the others goes on for as long again, as such things do.
            return Expected(min(generated, limit), 0.0)
        # By hand: `statistics` takes as long as a decode step where many requests run.
        mean = sum(left) / len(left)
        variance = sum(tokens * tokens for tokens in left) / len(left) - mean * mean
        # No output passes its limit, however the others were spread.
        return Expected(int(mean), min(math.sqrt(max(0.0, variance)), limit - mean))
