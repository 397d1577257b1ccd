"""What each fault cost: the requests between it and the next one."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from adakv_serve.loadtest.faults.asking import ANSWERED, Asked, Outcome
from adakv_serve.loadtest.faults.kinds import Kind

_FAILED = (Outcome.REFUSED, Outcome.FAILED, Outcome.CUT)
_COLUMNS = (*_FAILED, Outcome.HUNG, Outcome.WRONG)


class Struck(NamedTuple):
    """A fault that was done. Times are the machine's, in seconds.

    ended_s: when it was undone; the same as `struck_s` for one that is not.
    whole_s: seconds from then until all was as before; None for too long.
    seen: what it must not have seen.
    """

    name: str
    struck_s: float
    ended_s: float
    whole_s: float | None
    seen: Sequence[str] = ()


class Window(NamedTuple):
    """A fault and the requests that ended between it and the next one.

    under_way: requests that had begun when it came.
    serves_s: seconds from its end until requests were answered without error or delay.
    """

    struck: Struck
    under_way: int
    outcomes: Counter[Outcome]
    reasons: Counter[str]
    serves_s: float

    @property
    def failed(self) -> int:
        return sum(self.outcomes[outcome] for outcome in _FAILED)

    def problems(self, kind: Kind) -> list[str]:
        """Return what a fault of this kind must not do, but did."""
        forbidden = (Outcome.HUNG, Outcome.WRONG) if kind.loses else _COLUMNS
        found = [f"{self.outcomes[one]} {one}" for one in forbidden if self.outcomes[one]]
        found += self.struck.seen
        if self.serves_s > kind.serves_within_s:
            found.append(_late("serves again", self.serves_s, kind.serves_within_s))
        if self.struck.whole_s is None:
            found.append("never whole again")
        elif self.struck.whole_s > kind.whole_within_s:
            found.append(_late("whole again", self.struck.whole_s, kind.whole_within_s))
        return found

    def as_json(self, began_s: float) -> dict[str, Any]:
        struck = self.struck
        return {
            "fault": struck.name, "at_s": round(struck.struck_s - began_s, 2),
            "lasted_s": round(struck.ended_s - struck.struck_s, 2),
            "under_way": self.under_way, "outcomes": self.outcomes, "reasons": self.reasons,
            "serves_again_s": round(self.serves_s, 2), "whole_again_s": struck.whole_s,
        }  # fmt: skip


def _late(what: str, took_s: float, within_s: float) -> str:
    return f"{what} after {took_s:.1f} s instead of {within_s:.0f} s"


def windows(struck: Sequence[Struck], asked: Sequence[Asked], slow_s: float) -> list[Window]:
    """Give each request to the last fault before its end; those before the first to none.

    Args:
        slow_s: a request that takes longer is delayed.
    """
    ends = [one.struck_s for one in struck[1:]] + [float("inf")]
    return [
        _window(one, [each for each in asked if one.struck_s <= each.ended_s < until_s], slow_s)
        for one, until_s in zip(struck, ends, strict=True)
    ]


def _window(struck: Struck, mine: Sequence[Asked], slow_s: float) -> Window:
    return Window(
        struck,
        sum(one.began_s < struck.struck_s for one in mine),
        Counter(one.outcome for one in mine),
        Counter(f"{one.outcome}: {one.reason}" for one in mine if one.outcome in _COLUMNS),
        _serves_s(struck, mine, slow_s),
    )


def _serves_s(struck: Struck, mine: Sequence[Asked], slow_s: float) -> float:
    """Return the seconds from a fault's end to the last request after it that is disturbed.

    That is when it had begun: one that begins later is answered without error or delay.
    """
    disturbed = [
        one.began_s - struck.ended_s
        for one in mine
        if one.outcome not in ANSWERED or one.ended_s - one.began_s > slow_s
    ]
    return max([0.0, *disturbed])


def table(made: Sequence[Window], began_s: float) -> Iterator[str]:
    """Yield a line for each fault, with times from `began_s` on."""
    width = max((len(one.struck.name) for one in made), default=0)
    columns = ("under way", "answered", Outcome.CONTINUED, *_COLUMNS, "serves s", "whole s")
    yield f"{'':{width}} {'at s':>7}" + "".join(f"{column:>10}" for column in columns)
    for one in made:
        answered = sum(one.outcomes[outcome] for outcome in ANSWERED)
        counts = (
            one.under_way, answered, one.outcomes[Outcome.CONTINUED],
            *(one.outcomes[column] for column in _COLUMNS),
        )  # fmt: skip
        yield (
            f"{one.struck.name:{width}} {one.struck.struck_s - began_s:7.1f}"
            + "".join(f"{count:10}" for count in counts)
            + f"{one.serves_s:10.1f}{_seconds(one.struck.whole_s):>10}"
        )


class Sum(NamedTuple):
    """What all faults of one kind cost. The last two are the longest, in seconds."""

    kind: str
    times: int
    under_way: int
    failed: int
    hung: int
    wrong: int
    serves_again_s: float
    whole_again_s: float | None


def sums(made: Sequence[Window]) -> list[Sum]:
    """Return a row for each kind, in the order of their first faults."""
    kinds = list(dict.fromkeys(one.struck.name for one in made))
    return [_sum(kind, [one for one in made if one.struck.name == kind]) for kind in kinds]


def _sum(kind: str, made: Sequence[Window]) -> Sum:
    whole = [one.struck.whole_s for one in made]
    return Sum(
        kind,
        len(made),
        sum(one.under_way for one in made),
        sum(one.failed for one in made),
        sum(one.outcomes[Outcome.HUNG] for one in made),
        sum(one.outcomes[Outcome.WRONG] for one in made),
        round(max(one.serves_s for one in made), 2),
        None if None in whole else round(max(one for one in whole if one is not None), 2),
    )


def summary(rows: Iterable[Sum]) -> Iterator[str]:
    """Yield a table of Markdown with a row for each kind."""
    names = ("times", "under way", "failed", "hung", "wrong", "serves again (max s)",
             "whole again (max s)")  # fmt: skip
    yield f"| {'kind':20} | " + " | ".join(names) + " |"
    yield "|---|" + "---:|" * len(names)
    for row in rows:
        cells = [str(cell) for cell in row[1:6]]
        cells += [_seconds(row.serves_again_s), _seconds(row.whole_again_s)]
        padded = (f"{cell:>{len(name)}}" for cell, name in zip(cells, names, strict=True))
        yield f"| {row.kind:20} | " + " | ".join(padded) + " |"


def _seconds(seconds: float | None) -> str:
    return "never" if seconds is None else f"{seconds:.1f}"
