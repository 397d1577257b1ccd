"""The fleet over time: its replicas, also those that are gone, and what has happened to them."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from adakv_serve.router.ledger.occupancy import REPORT_TTL_S, Occupancy, Report
from adakv_serve.serving.http.page.figures import FRESH, GONE, SILENT, ReplicaFigures

# A router may forget a replica for a moment, until its next report.
_ABSENT_S = 3.0
# How long a replica that is gone is shown.
_SHOWN_S = 60.0
_MOST_EVENTS = 30


class FleetEvent(NamedTuple):
    """Something that has happened to a replica.

    number: of the event, from 1.
    at_s: Unix time.
    kind: joined, silent, back, gone, restarted, moved, returned, preempted, lends.
    amount: of requests, for lends of blocks; 0 where nothing is counted.
    """

    number: int
    at_s: float
    kind: str
    replica_id: str
    amount: int


class Changes(NamedTuple):
    """Requests that were preempted, and those that moved, since the reports before."""

    preempted: int
    moved: int


@dataclass
class _Known:
    report: Occupancy
    state: int
    seen_s: float
    gone_s: float = 0.0


class Fleet:
    """The replicas that were reported lately, and the last events."""

    def __init__(self) -> None:
        self._known: dict[str, _Known] = {}
        self._events: deque[FleetEvent] = deque(maxlen=_MOST_EVENTS)
        self._number = 0
        self._begun = False

    def update(self, reports: Sequence[Report], now_s: float, at_s: float) -> Changes:
        """Take the present reports of all replicas.

        Args:
            now_s: by the caller's monotonic clock.
            at_s: Unix time.
        """
        preempted = moved = 0
        for report, age_s in reports:
            state = FRESH if age_s <= REPORT_TTL_S else SILENT
            known = self._known.get(report.replica_id)
            if known is None:
                self._known[report.replica_id] = _Known(report, state, now_s)
                # Those of the first time have been there before.
                if self._begun:
                    self._note("joined", report.replica_id, at_s)
                continue
            preempted += _grown(known.report, report, report.preemptions, known.report.preemptions)
            moved += _grown(known.report, report, report.moves, known.report.moves)
            for kind, amount in _news(known, report, state):
                self._note(kind, report.replica_id, at_s, amount)
            known.report, known.state, known.seen_s = report, state, now_s
        self._miss({report.replica_id for report, _ in reports}, now_s, at_s)
        self._begun = True
        return Changes(preempted, moved)

    def _miss(self, reported: set[str], now_s: float, at_s: float) -> None:
        """Note which replicas are not reported any more."""
        for replica_id, known in list(self._known.items()):
            if replica_id in reported:
                continue
            if known.state == GONE:
                if now_s - known.gone_s > _SHOWN_S:
                    del self._known[replica_id]
            elif now_s - known.seen_s > _ABSENT_S:
                known.state, known.gone_s = GONE, now_s
                self._note("gone", replica_id, at_s)

    def _note(self, kind: str, replica_id: str, at_s: float, amount: int = 0) -> None:
        self._number += 1
        self._events.append(FleetEvent(self._number, round(at_s, 1), kind, replica_id, amount))

    def figures(self) -> list[ReplicaFigures]:
        """Return the figures of all replicas, in the order in which they came."""
        return [ReplicaFigures.of(known.report, known.state) for known in self._known.values()]

    def events(self, after: int = 0) -> list[FleetEvent]:
        """Return the last events whose numbers are above `after`, the oldest first."""
        return [event for event in self._events if event.number > after]


def _news(known: _Known, report: Occupancy, state: int) -> Iterator[tuple[str, int]]:
    """Yield what a report shows to have happened since the one before, with amounts."""
    before = known.report
    if report.epoch != before.epoch:
        yield "restarted", 0
    elif known.state != state:
        yield ("back" if state == FRESH else "silent"), 0
    if count := _grown(before, report, report.preemptions, before.preemptions):
        yield "preempted", count
    if count := _grown(before, report, report.moves, before.moves):
        yield "moved", count
    if count := _grown(before, report, report.failed_moves, before.failed_moves):
        yield "returned", count
    if report.blocks_lent and not before.blocks_lent:
        yield "lends", report.blocks_lent


def _grown(before: Occupancy, now: Occupancy, count: int | None, old: int | None) -> int:
    """Return how much a count has grown; it starts at 0 in each life of a replica."""
    start = old if now.epoch == before.epoch else 0
    return max(0, (count or 0) - (start or 0))
