"""Whether a request may start: how much the running ones will still grow, as plain arithmetic."""

import math
from collections import deque
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_Floats = NDArray[np.float64]

# Stands for no bound, and stays exact in sums of thousands.
UNBOUNDED = 1 << 40
# Steps for which a decision that a request waits is good, if nothing begins or ends.
_DECIDED_STEPS = 8


class Life(NamedTuple):
    """A request that holds blocks, or wants to.

    tokens: what fills its blocks.
    most_tokens: what that never exceeds, however many come; `UNBOUNDED` if it grows to its end.
    answered: tokens of its answer by now.
    left: most that may still come.
    due: least that will still come, whatever the answer says.
    max_tokens: what it asked for: `OutputLengths` has classes of it.
    """

    tokens: int
    most_tokens: int
    answered: int
    left: int
    due: int
    max_tokens: int


class Expected(NamedTuple):
    """Tokens still to come of R answers: means and standard deviations [R]."""

    tokens: _Floats
    spread: _Floats


class _Sums(NamedTuple):
    """Lengths [n] in order, the sums [n + 1] of the first of them, and of their squares."""

    lengths: _Floats
    sums: _Floats
    squares: _Floats


class _Ended:
    """The lengths of the last answers of one class."""

    def __init__(self, prior_tokens: int, remembered: int) -> None:
        # What is assumed before anything has ended counts as the first that did.
        self._lengths = deque([prior_tokens], maxlen=remembered)
        self._sums: _Sums | None = None

    def note(self, tokens: int) -> None:
        self._lengths.append(tokens)
        self._sums = None

    def one_to_come(self, answered: int, limit: int) -> tuple[float, float]:
        """Return mean and standard deviation of what one answer will still bring."""
        left = [min(length - answered, limit) for length in self._lengths if length > answered]
        if not left:
            # One that has outlived all the others goes on for as long again, as such things do.
            return min(answered, limit), 0.0
        mean = sum(left) / len(left)
        square = sum(tokens * tokens for tokens in left) / len(left)
        # No output passes its limit, however the others were spread.
        return mean, min(math.sqrt(max(0.0, square - mean * mean)), limit - mean)

    def to_come(self, answered: _Floats, limit: _Floats) -> Expected:
        """Return what `one_to_come` does, for R answers."""
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


class OutputLengths:
    """How long answers are: learnt from the last ones that ended, by class of `max_tokens`.

    A class has all `max_tokens` of one number of bits: clients that ask for one token, for eight
    and for thousands do different things.

    prior_tokens: the length that is assumed at first.
    """

    def __init__(self, prior_tokens: int, remembered: int = 64) -> None:
        self._prior_tokens = prior_tokens
        self._remembered = remembered
        self._classes: dict[int, _Ended] = {}

    def note(self, max_tokens: int, tokens: int) -> None:
        """Learn from an answer that ended by itself, or by its `max_tokens`."""
        self._class(max_tokens.bit_length()).note(tokens)

    def one_to_come(self, life: Life) -> tuple[float, float]:
        """Return mean and standard deviation of what one request's answer will still bring."""
        if life.due >= life.left:
            return life.left, 0.0
        mean, spread = self._class(life.max_tokens.bit_length()).one_to_come(
            life.answered, life.left
        )
        return max(mean, life.due), spread

    def to_come(self, answered: _Floats, limit: _Floats, due: _Floats, bits: _Floats) -> Expected:
        """Return what `one_to_come` does, for R answers.

        Args:
            bits: of each one's `max_tokens`.
        """
        expected = self._by_class(answered, limit, bits)
        if not due.any():
            return expected
        certain = due >= limit
        return Expected(
            np.where(certain, limit, np.maximum(expected.tokens, due)),
            np.where(certain, 0.0, expected.spread),
        )

    def _by_class(self, answered: _Floats, limit: _Floats, bits: _Floats) -> Expected:
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


class Lives:
    """R requests from now on, each growing by one token per step to its end.

    After Past-Future scheduling (2507.10150), which sizes a batch by its future, not its present.
    How long each goes on is uncertain: one standard deviation of the sum is added. One that comes
    to its bound counts with that until it ends.
    """

    def __init__(self, table: _Floats, lengths: OutputLengths) -> None:
        """
        Args:
            table: [fields of `Life`, R], with the number of bits of `max_tokens` for that.
        """
        tokens, most, answered, left, due, bits = table
        to_come = lengths.to_come(answered, left, due, bits)
        # The longest first: when one ends, those before it are still there.
        order = (-to_come.tokens).argsort(kind="stable")
        self._ends = np.floor(to_come.tokens[order])
        held, most, spread = tokens[order], most[order], to_come.spread[order]
        bounded = held + self._ends >= most
        self._growing = (~bounded).cumsum()
        if bounded.any():
            held = np.where(bounded, most, held)
            spread = np.where(bounded, 0.0, spread)
        self._held = held.cumsum()
        self._variance = (spread * spread).cumsum()

    def __len__(self) -> int:
        return len(self._ends)

    def peak_tokens(self) -> int:
        """Return the most tokens that the requests hold together."""
        if not len(self):
            return 0
        margin = np.ceil(np.sqrt(self._variance))
        return int((self._held + self._growing * self._ends + margin).max())

    def peak_with(self, other: Life, to_come: tuple[float, float]) -> int:
        """Return the most tokens that they hold together with one other request, until it ends.

        What comes later is the same without it.

        Args:
            to_come: what the other's answer will bring, and its deviation.
        """
        end, spread = int(to_come[0]), to_come[1]
        held, growing, variance = other.tokens, 1, spread * spread
        if held + end >= other.most_tokens:
            held, growing, variance = other.most_tokens, 0, 0.0
        # At its own end those are there that last as long.
        last = int((-self._ends).searchsorted(-end, side="right"))
        at_end, variance_at_end = float(held + growing * end), variance
        if last:
            at_end += float(self._held[last - 1] + self._growing[last - 1] * end)
            variance_at_end += float(self._variance[last - 1])
        peak = at_end + math.ceil(math.sqrt(variance_at_end))
        if last < len(self):
            margin = np.ceil(np.sqrt(self._variance[last:] + variance))
            growth = (self._growing[last:] + growing) * self._ends[last:]
            peak = max(peak, held + float((self._held[last:] + growth + margin).max()))
        return int(peak)


class LifeTable:
    """The requests that hold blocks, as rows that grow by themselves from step to step.

    A request whose life goes on otherwise than by a token a step is put in anew.
    """

    def __init__(self) -> None:
        # The fields of `Life`, with bits for `max_tokens`, and the step in which they were so.
        self._rows = np.zeros((len(Life._fields) + 1, 16))
        self._places: dict[str, int] = {}
        self._names: list[str] = []

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def put(self, name: str, life: Life, step: int) -> None:
        """Note a request as it is in a step."""
        place = self._places.get(name)
        if place is None:
            place = self._places[name] = len(self._names)
            self._names.append(name)
            if place == self._rows.shape[1]:
                self._rows = np.concatenate((self._rows, np.zeros_like(self._rows)), axis=1)
        self._rows[:, place] = (*life[:-1], life.max_tokens.bit_length(), step)

    def drop(self, name: str) -> None:
        """Forget a request, if it is there."""
        if (place := self._places.pop(name, None)) is None:
            return
        last = self._names.pop()
        if last != name:
            # The rows stay without gaps.
            self._rows[:, place] = self._rows[:, len(self._names)]
            self._names[place], self._places[last] = last, place

    def lives(self, lengths: OutputLengths, step: int) -> Lives:
        """Return the lives of all as they are in a step."""
        table = self._rows[:-1, : len(self._names)].copy()
        tokens, _, answered, left, due, _ = table
        passed = np.minimum(step - self._rows[-1, : len(self._names)], left)
        tokens += passed
        answered += passed
        left -= passed
        due -= passed
        return Lives(table, lengths)


class Holds:
    """Requests that have room now and wait all the same, until others have ended.

    Waiting saves a prefill that a preemption would repeat, and it rests on a forecast. So a request
    waits no longer than it would run itself, and what changes nothing is decided once.
    """

    def __init__(self) -> None:
        self._step = 0
        # The step in which each request's wait ends, and the one in which to decide again.
        self._until: dict[str, int] = {}
        self._again: dict[str, int] = {}

    def next_step(self) -> None:
        """A step begins."""
        self._step += 1

    def changed(self, request_id: str) -> None:
        """A request has begun, grown otherwise than expected, or ended: nothing is decided."""
        self._again.clear()
        self._until.pop(request_id, None)

    def known(self, request_id: str) -> bool | None:
        """Return whether a request waits, or None if that is to be decided."""
        if self._step >= self._until.get(request_id, self._step + 1):
            return False
        return True if self._step < self._again.get(request_id, 0) else None

    def decide(self, request_id: str, *, fits: bool, own_steps: int) -> bool:
        """Return whether a request waits.

        Args:
            fits: whether all would fit until it ends, as far as one can tell.
            own_steps: how long it will probably run.
        """
        if fits:
            return False
        self._until.setdefault(request_id, self._step + max(1, own_steps))
        self._again[request_id] = self._step + _DECIDED_STEPS
        return True
