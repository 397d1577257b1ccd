"""Whether a request may start: how much the running ones will still grow, as plain arithmetic."""

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_Floats = NDArray[np.float64]
_Ints = NDArray[np.int64]

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
    max_tokens: what it asked for, by which `OutputLengths` tells classes of answers.
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


class _Ended:
    """The lengths of the last answers of one class, with the sums that `to_come` needs."""

    def __init__(self, prior_tokens: int, remembered: int) -> None:
        # What is assumed before anything has ended counts as the first that did.
        self._lengths = deque([prior_tokens], maxlen=remembered)
        self._sums: tuple[_Ints, _Ints, _Ints] | None = None

    def note(self, tokens: int) -> None:
        self._lengths.append(tokens)
        self._sums = None

    def to_come(self, answered: _Ints, limit: _Ints) -> Expected:
        lengths, sums, squares = self._sums or self._summed()
        first = np.searchsorted(lengths, answered, side="right")
        last = np.searchsorted(lengths, answered + limit, side="right")
        longer, uncut = len(lengths) - first, last - first
        cut = len(lengths) - last
        count = np.maximum(longer, 1)
        total = sums[last] - sums[first] - answered * uncut + limit * cut
        square = (
            squares[last] - squares[first] - 2 * answered * (sums[last] - sums[first])
            + answered * answered * uncut + limit * limit * cut
        )  # fmt: skip
        mean = total / count
        spread = np.sqrt(np.maximum(square / count - mean * mean, 0.0))
        # One that has outlived all the others goes on for as long again, as such things do.
        outlived = longer == 0
        mean = np.where(outlived, np.minimum(answered, limit), mean)
        # No output passes its limit, however the others were spread.
        spread = np.where(outlived, 0.0, np.minimum(spread, limit - mean))
        return Expected(mean, spread)

    def _summed(self) -> tuple[_Ints, _Ints, _Ints]:
        lengths = np.sort(np.array(self._lengths, dtype=np.int64))
        self._sums = (
            lengths,
            np.concatenate(([0], np.cumsum(lengths))),
            np.concatenate(([0], np.cumsum(lengths * lengths))),
        )
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

    def to_come(self, answered: _Ints, limit: _Ints, due: _Ints, max_tokens: _Ints) -> Expected:
        """Return what R answers will still bring, see `Life`."""
        kinds = np.frexp(max_tokens.astype(np.float64))[1]
        if len(kinds) and kinds.min() == kinds.max():
            expected = self._class(int(kinds[0])).to_come(answered, limit)
        else:
            expected = Expected(*np.zeros((2, len(kinds))))
            for kind in set(kinds.tolist()):
                members = kinds == kind
                part = self._class(kind).to_come(answered[members], limit[members])
                expected.tokens[members], expected.spread[members] = part
        certain = due >= limit
        return Expected(
            np.where(certain, limit, np.maximum(expected.tokens, due)),
            np.where(certain, 0.0, expected.spread),
        )

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

    def __init__(self, table: _Ints, lengths: OutputLengths) -> None:
        """
        Args:
            table: [fields of `Life`, R].
        """
        tokens, most, answered, left, due, max_tokens = table
        to_come = lengths.to_come(answered, left, due, max_tokens)
        # The longest first: when one ends, those before it are still there.
        order = np.argsort(-to_come.tokens, kind="stable")
        self._ends = np.floor(to_come.tokens[order])
        held, most = tokens[order], most[order]
        bounded = held + self._ends >= most
        self._held = np.cumsum(np.where(bounded, most, held))
        self._growing = np.cumsum(~bounded)
        self._variance = np.cumsum(np.where(bounded, 0.0, to_come.spread[order] ** 2))

    @classmethod
    def of(cls, lives: Sequence[Life], lengths: OutputLengths) -> "Lives":
        """Return the lives of requests."""
        return cls(np.array(lives, dtype=np.int64).reshape(-1, len(Life._fields)).T, lengths)

    def __len__(self) -> int:
        return len(self._ends)

    def peak_tokens(self) -> int:
        """Return the most tokens that the requests hold together."""
        if not len(self):
            return 0
        margin = np.ceil(np.sqrt(self._variance))
        return int((self._held + self._growing * self._ends + margin).max())

    def peak_with(self, other: "Lives") -> int:
        """Return the most tokens that they hold together with one other request, until it ends.

        What comes later is the same without it.
        """
        (end,), (held,), (growing,) = other._ends, other._held, other._growing
        variance = other._variance[0]
        # At its own end those are there that last as long.
        last = int(np.searchsorted(-self._ends, -end, side="right"))
        at_end = held + growing * end
        if last:
            at_end += self._held[last - 1] + self._growing[last - 1] * end
            variance_at_end = variance + self._variance[last - 1]
        else:
            variance_at_end = variance
        peak = at_end + np.ceil(np.sqrt(variance_at_end))
        if last < len(self):
            margin = np.ceil(np.sqrt(self._variance[last:] + variance))
            growth = (self._growing[last:] + growing) * self._ends[last:]
            peak = max(peak, held + (self._held[last:] + growth + margin).max())
        return int(peak)

    @property
    def longest(self) -> int:
        """Return the steps until the last one ends."""
        return int(self._ends[0]) if len(self) else 0


class LifeTable:
    """The requests that hold blocks, as rows that grow by themselves from step to step.

    A request whose life goes on otherwise than by a token a step is put in anew.
    """

    def __init__(self) -> None:
        self._rows = np.zeros((len(Life._fields), 16), dtype=np.int64)
        self._since = np.zeros(16, dtype=np.int64)
        self._used: dict[str, int] = {}
        self._free = list(range(15, -1, -1))

    def __len__(self) -> int:
        return len(self._used)

    def __contains__(self, name: str) -> bool:
        return name in self._used

    def put(self, name: str, life: Life, step: int) -> None:
        """Note a request as it is in a step."""
        row = self._used.get(name)
        if row is None:
            if not self._free:
                self._grow()
            row = self._used[name] = self._free.pop()
        self._rows[:, row] = life
        self._since[row] = step

    def drop(self, name: str) -> None:
        """Forget a request, if it is there."""
        if (row := self._used.pop(name, None)) is not None:
            self._free.append(row)

    def lives(self, lengths: OutputLengths, step: int) -> Lives:
        """Return the lives of all as they are in a step."""
        index = np.fromiter(self._used.values(), dtype=np.int64, count=len(self._used))
        tokens, most, answered, left, due, max_tokens = self._rows[:, index]
        passed = np.minimum(step - self._since[index], left)
        table = np.stack(
            (
                tokens + passed, most, answered + passed, left - passed,
                np.maximum(due - passed, 0), max_tokens,
            )
        )  # fmt: skip
        return Lives(table, lengths)

    def _grow(self) -> None:
        count = self._rows.shape[1]
        self._rows = np.concatenate((self._rows, np.zeros_like(self._rows)), axis=1)
        self._since = np.concatenate((self._since, np.zeros_like(self._since)))
        self._free = list(range(2 * count - 1, count - 1, -1))


class Holds:
    """Requests that have room now and wait all the same, until others have ended.

    Waiting saves a prefill that a preemption would repeat, and it rests on a forecast. So a request
    waits no longer than it would run itself, and what changes nothing is decided once.
    """

    def __init__(self) -> None:
        self._step = 0
        # Of each request: the step in which its wait ends, and the one in which to decide again.
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
