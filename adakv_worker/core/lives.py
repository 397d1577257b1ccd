"""How much room the running requests will take at most, by their lives."""

import math

import numpy as np

from adakv_worker.core.answer_lengths import AnswerLengths, Floats
from adakv_worker.core.plan import Life


class Lives:
    """R requests from now on, each growing by one token per step to its end.

    This follows Past-Future scheduling (2507.10150), which sizes a batch by its future peak. The
    ends are uncertain: one standard deviation of the sum is added. A request that reaches its bound
    counts with the bound until it ends.
    """

    def __init__(self, table: Floats, lengths: AnswerLengths) -> None:
        """
        Args:
            table: [fields of `Life`, R], with the number of bits of `max_tokens` in its place.
        """
        room, most, per_token, answered, left, due, bits = table
        to_come = lengths.to_come(answered, left, due, bits)
        # The longest come first: when one ends, those before it are still there.
        order = (-to_come.tokens).argsort(kind="stable")
        self._ends = np.floor(to_come.tokens[order])
        held, most, rate = room[order], most[order], per_token[order]
        spread = to_come.spread[order] * rate
        bounded = held + rate * self._ends >= most
        self._rates = np.where(bounded, 0.0, rate).cumsum()
        if bounded.any():
            held = np.where(bounded, most, held)
            spread = np.where(bounded, 0.0, spread)
        self._held = held.cumsum()
        self._variance = (spread * spread).cumsum()

    def __len__(self) -> int:
        return len(self._ends)

    def peak_room(self) -> int:
        """Return the most room that the requests take together."""
        if not len(self):
            return 0
        margin = np.ceil(np.sqrt(self._variance))
        return int((self._held + self._rates * self._ends + margin).max())

    def peak_with(self, other: Life, to_come: tuple[float, float]) -> int:
        """Return the most room that they take together with one other request, until it ends.

        Args:
            to_come: mean and deviation of the tokens still to come of the other's answer.
        """
        end, rate = int(to_come[0]), other.per_token
        held, variance = other.room, (to_come[1] * rate) ** 2
        if held + rate * end >= other.most_room:
            held, rate, variance = other.most_room, 0, 0.0
        # Those that last at least as long are still there at its end.
        last = int((-self._ends).searchsorted(-end, side="right"))
        at_end, variance_at_end = float(held + rate * end), variance
        if last:
            at_end += float(self._held[last - 1] + self._rates[last - 1] * end)
            variance_at_end += float(self._variance[last - 1])
        peak = at_end + math.ceil(math.sqrt(variance_at_end))
        if last < len(self):
            margin = np.ceil(np.sqrt(self._variance[last:] + variance))
            growth = (self._rates[last:] + rate) * self._ends[last:]
            peak = max(peak, held + float((self._held[last:] + growth + margin).max()))
        return int(peak)


class LifeTable:
    """Lives of the requests that hold blocks, each growing by a token per step by itself.

    A request that grows otherwise must be put in again.
    """

    def __init__(self) -> None:
        # Fields of `Life`, with bits for `max_tokens`, and the step in which they were put in.
        self._rows = np.zeros((len(Life._fields) + 1, 16))
        self._places: dict[str, int] = {}
        self._names: list[str] = []

    def __len__(self) -> int:
        return len(self._names)

    def put(self, name: str, life: Life, step: int) -> None:
        """Set a request's life as of a step."""
        place = self._places.get(name)
        if place is None:
            place = self._places[name] = len(self._names)
            self._names.append(name)
            if place == self._rows.shape[1]:
                self._rows = np.concatenate((self._rows, np.zeros_like(self._rows)), axis=1)
        self._rows[:, place] = (*life[:-1], life.max_tokens.bit_length(), step)

    def drop(self, name: str) -> None:
        """Remove a request, if it is there."""
        if (place := self._places.pop(name, None)) is None:
            return
        last = self._names.pop()
        if last != name:
            # The last row fills the gap.
            self._rows[:, place] = self._rows[:, len(self._names)]
            self._names[place], self._places[last] = last, place

    def lives(self, lengths: AnswerLengths, step: int) -> Lives:
        """Return the lives of all requests as of a step."""
        table = self._rows[:-1, : len(self._names)].copy()
        room, _, per_token, answered, left, due, _ = table
        passed = np.minimum(step - self._rows[-1, : len(self._names)], left)
        room += passed * per_token
        answered += passed
        left -= passed
        due -= passed
        return Lives(table, lengths)
