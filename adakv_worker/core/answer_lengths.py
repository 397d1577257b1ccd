"""How long answers will be, learnt from those that have ended."""

import math
from collections import deque
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from adakv_worker.core.plan import Life

Floats = NDArray[np.float64]


class Expected(NamedTuple):
    """Tokens still to come of R answers: means and standard deviations [R]."""

    tokens: Floats
    spread: Floats


class _Sums(NamedTuple):
    """Lengths [n] in order, the sums [n + 1] of the first of them, and of their squares."""

    lengths: Floats
    sums: Floats
    squares: Floats


class _Ended:
    """The lengths of the last answers of one class."""

    def __init__(self, prior_tokens: int, remembered: int) -> None:
        # The length assumed at first counts like the first answer's.
        self._lengths = deque([prior_tokens], maxlen=remembered)
        self._sums: _Sums | None = None

    def note(self, tokens: int) -> None:
        self._lengths.append(tokens)
        self._sums = None

    def one_to_come(self, answered: int, limit: int) -> tuple[float, float]:
        """Return mean and standard deviation of the tokens still to come of one answer."""
        left = [min(length - answered, limit) for length in self._lengths if length > answered]
        if not left:
            # An answer that has outlived all the others is expected to go on for as long again.
            return min(answered, limit), 0.0
        mean = sum(left) / len(left)
        square = sum(tokens * tokens for tokens in left) / len(left)
        # No answer exceeds its limit, however the others were spread.
        return mean, min(math.sqrt(max(0.0, square - mean * mean)), limit - mean)

    def to_come(self, answered: Floats, limit: Floats) -> Expected:
        """Return the result of `one_to_come` for R answers."""
        lengths, sums, squares = self._sums or self._summed()
        first = lengths.searchsorted(answered, side="right")
        last = lengths.searchsorted(answered + limit, side="right")
        count = np.maximum(len(lengths) - first, 1)
        uncut, cut = last - first, len(lengths) - last
        of_uncut = sums[last] - sums[first]
        mean = (of_uncut - answered * uncut + limit * cut) / count
        square = squares[last] - squares[first]
        square += answered * (answered * uncut - 2 * of_uncut) + limit * limit * cut
        variance = np.maximum(square / count - mean * mean, 0.0)
        outlived = first == len(lengths)
        mean = np.where(outlived, np.minimum(answered, limit), mean)
        spread = np.where(outlived, 0.0, np.minimum(np.sqrt(variance), limit - mean))
        return Expected(mean, spread)

    def _summed(self) -> _Sums:
        lengths = np.array(sorted(self._lengths), dtype=np.float64)
        sums, squares = np.zeros((2, len(lengths) + 1))
        lengths.cumsum(out=sums[1:])
        (lengths * lengths).cumsum(out=squares[1:])
        self._sums = _Sums(lengths, sums, squares)
        return self._sums


class AnswerLengths:
    """Lengths of the last answers that ended, by class of `max_tokens`.

    A class has all `max_tokens` of one number of bits: clients that ask for one token, for eight
    and for thousands do different things.
    """

    def __init__(self, prior_tokens: int, remembered: int = 64) -> None:
        """
        Args:
            prior_tokens: length assumed until an answer has ended.
            remembered: number of answers kept for each class.
        """
        self._prior_tokens = prior_tokens
        self._remembered = remembered
        self._classes: dict[int, _Ended] = {}

    def note(self, max_tokens: int, tokens: int) -> None:
        """Learn from an answer that ended by itself, or by its `max_tokens`."""
        self._class(max_tokens.bit_length()).note(tokens)

    def one_to_come(self, life: Life) -> tuple[float, float]:
        """Return mean and standard deviation of the tokens still to come of a request's answer."""
        if life.due >= life.left:
            return life.left, 0.0
        mean, spread = self._class(life.max_tokens.bit_length()).one_to_come(
            life.answered, life.left
        )
        return max(mean, life.due), spread

    def to_come(self, answered: Floats, limit: Floats, due: Floats, bits: Floats) -> Expected:
        """Return the result of `one_to_come` for R answers.

        Args:
            bits: number of bits of each answer's `max_tokens`.
        """
        expected = self._by_class(answered, limit, bits)
        if not due.any():
            return expected
        certain = due >= limit
        return Expected(
            np.where(certain, limit, np.maximum(expected.tokens, due)),
            np.where(certain, 0.0, expected.spread),
        )

    def _by_class(self, answered: Floats, limit: Floats, bits: Floats) -> Expected:
        kinds = set(bits.tolist())
        if len(kinds) == 1:
            return self._class(int(kinds.pop())).to_come(answered, limit)
        expected = Expected(*np.zeros((2, len(bits))))
        for kind in kinds:
            members = bits == kind
            part = self._class(int(kind)).to_come(answered[members], limit[members])
            expected.tokens[members], expected.spread[members] = part
        return expected

    def _class(self, bits: int) -> _Ended:
        if bits not in self._classes:
            self._classes[bits] = _Ended(self._prior_tokens, self._remembered)
        return self._classes[bits]
