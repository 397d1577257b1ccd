"""How many users there are at a time of a test: the arithmetic of the shapes."""

from typing import NamedTuple, Self


class Ramp(NamedTuple):
    """A straight line from `first` to `last` users in `seconds`."""

    first: float
    last: float
    seconds: float

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raise ValueError for anything but three positive numbers, `first:last:seconds`."""
        try:
            ramp = cls(*map(float, text.split(":")))
        except (ValueError, TypeError):
            raise ValueError("expected users at first:users at last:seconds") from None
        if not all(number > 0 for number in ramp):
            raise ValueError("users and seconds must be positive")
        return ramp

    def users(self, elapsed_s: float) -> int | None:
        """Return the users at this time; None once the ramp is over."""
        progress = elapsed_s / self.seconds
        if progress >= 1:
            return None
        return round(self.first + (self.last - self.first) * progress)


class Steps(NamedTuple):
    """Steps of so many users, each `seconds` long."""

    counts: tuple[int, ...]
    seconds: float

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raise ValueError for anything but positive numbers, `users,users,…:seconds`."""
        try:
            counts, seconds = text.split(":")
            steps = cls(tuple(int(count) for count in counts.split(",")), float(seconds))
        except ValueError:
            raise ValueError("expected users,users,…:seconds of each") from None
        if not all(number > 0 for number in (*steps.counts, steps.seconds)):
            raise ValueError("users and seconds must be positive")
        return steps

    def users(self, elapsed_s: float) -> int | None:
        """Return the users at this time; None once the last step is over."""
        step = int(elapsed_s / self.seconds)
        return self.counts[step] if step < len(self.counts) else None
