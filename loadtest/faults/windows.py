"""What each fault cost: the requests between it and the next one."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from loadtest.faults.asking import Asked, Outcome
from loadtest.faults.kinds import Kind

_COLUMNS = (Outcome.REFUSED, Outcome.FAILED, Outcome.CUT, Outcome.HUNG, Outcome.WRONG)


class Struck(NamedTuple):
    """A fault that was done. recovered_s: seconds until all was well; None for too long."""

    name: str
    struck_s: float
    recovered_s: float | None


class Window(NamedTuple):
    """A fault and the requests that ended between it and the next one.

    under_way: requests that had begun when it came.
    """

    struck: Struck
    under_way: int
    outcomes: Counter[Outcome]
    reasons: Counter[str]

    def problems(self, kind: Kind) -> list[str]:
        """Return what a fault of this kind must not do, but did."""
        found = [
            f"{self.outcomes[outcome]} {outcome}"
            for outcome in (Outcome.HUNG, Outcome.WRONG)
            if self.outcomes[outcome]
        ]
        if not kind.loses:
            found += [
                f"{self.outcomes[outcome]} {outcome}"
                for outcome in (Outcome.REFUSED, Outcome.FAILED, Outcome.CUT)
                if self.outcomes[outcome]
            ]
        recovered_s = self.struck.recovered_s
        if recovered_s is None:
            found.append("no recovery")
        elif recovered_s > kind.within_s:
            found.append(f"recovery after {recovered_s:.1f} s instead of {kind.within_s:.0f} s")
        return found


def windows(struck: Sequence[Struck], asked: Sequence[Asked]) -> list[Window]:
    """Give each request to the last fault before its end; those before the first to none."""
    made = []
    ends = [one.struck_s for one in struck[1:]] + [float("inf")]
    for one, until_s in zip(struck, ends, strict=True):
        mine = [each for each in asked if one.struck_s <= each.ended_s < until_s]
        made.append(
            Window(
                one,
                sum(each.began_s < one.struck_s for each in mine),
                Counter(each.outcome for each in mine),
                Counter(
                    f"{each.outcome}: {each.reason}" for each in mine if each.outcome in _COLUMNS
                ),
            )
        )
    return made


def table(made: Sequence[Window], began_s: float) -> Iterator[str]:
    """Yield a line for each fault, with times from `began_s` on."""
    width = max((len(one.struck.name) for one in made), default=0)
    heads = "".join(f"{column:>9}" for column in ("under way", "answered", *_COLUMNS))
    yield f"{'':{width}} {'at s':>7}{heads}{'recovered s':>13}"
    for one in made:
        well = one.outcomes[Outcome.RIGHT] + one.outcomes[Outcome.TIE]
        counts = (one.under_way, well, *(one.outcomes[column] for column in _COLUMNS))
        recovered_s = one.struck.recovered_s
        yield (
            f"{one.struck.name:{width}} {one.struck.struck_s - began_s:7.1f}"
            + "".join(f"{count:9}" for count in counts)
            + (f"{'never':>13}" if recovered_s is None else f"{recovered_s:13.1f}")
        )
