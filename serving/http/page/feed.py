"""The feed of the fleet page: one state a second for all viewers, as server-sent events."""

import asyncio
import json
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from adakv_serve.router.decision_log import Decided, DecisionLog
from adakv_serve.router.ledger.occupancy import Report
from adakv_serve.serving.http.page.figures import FleetFigures, ReplicaFigures, summed
from adakv_serve.serving.http.page.fleet import Fleet

_GAP_S = 1.0
# Viewers of a larger fleet get its state less often, so that the bytes a second stay the same.
_REPLICAS_PER_S = 64
_MOST_SAMPLES = 300


class FeedFull(Exception):
    """There are as many viewers as there may be."""


class Scale(NamedTuple):
    """What the controller wants the fleet's size to be; least and most only with autoscaling."""

    target: int
    least: int | None = None
    most: int | None = None


class FeedSource(NamedTuple):
    """Where a feed reads. Each function returns at once, from this process' memory.

    reports: the last report of each replica.
    decisions: of this process' router; None without one.
    scale: None while it is unknown.
    """

    reports: Callable[[], list[Report]]
    decisions: DecisionLog | None = None
    scale: Callable[[], Scale | None] = lambda: None


class _State(NamedTuple):
    """What a viewer gets. Numbers are those of the last event and of the last decision.

    clock_s: the time of `figures` by the clock of the decisions.
    """

    rows: dict[str, ReplicaFigures]
    figures: FleetFigures | None
    event: int = 0
    decision: int = 0
    clock_s: float = 0.0


_NOTHING = _State({}, None)


class Feed:
    """Reads its source once a second, and sends all viewers the same.

    A viewer gets the newest state when it has taken the one before: nothing is queued for it. Who
    has the state before gets the rows that have changed, any other one all rows.
    """

    def __init__(
        self,
        source: FeedSource,
        facts: Mapping[str, Any],
        most_viewers: int,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """
        Args:
            facts: what does not change, for the first event of each viewer.
        """
        self._source = source
        self._facts = dict(facts)
        self._most_viewers = most_viewers
        self._clock = clock
        self._wall_clock = wall_clock
        self._fleet = Fleet()
        self._samples: deque[FleetFigures] = deque(maxlen=_MOST_SAMPLES)
        self._number = 0
        self._before = self._now = _NOTHING
        # Made when the first viewer asks for them.
        self._encoded: dict[bool, bytes] = {}
        # Set at the next tick; later ones have another.
        self._ticked = asyncio.Event()
        self.viewers = 0

    @property
    def gap_s(self) -> float:
        """Time from one tick to the next."""
        return max(_GAP_S, len(self._now.rows) / _REPLICAS_PER_S)

    async def run(self) -> None:
        """Tick until cancelled."""
        while True:
            self.tick()
            await asyncio.sleep(self.gap_s)

    def tick(self) -> None:
        """Read the source, and let all viewers have the new state."""
        at_s, clock_s = self._wall_clock(), self._clock()
        changes = self._fleet.update(self._source.reports(), clock_s, at_s)
        rows = {row.id: row for row in self._fleet.figures()}
        figures = summed(rows.values(), at_s, changes.preempted, changes.moved)
        self._samples.append(figures)
        events, decisions = self._fleet.events(), self._decisions()
        self._before = self._now
        self._now = _State(
            rows,
            figures,
            events[-1].number if events else 0,
            decisions[-1].number if decisions else 0,
            clock_s,
        )
        self._number += 1
        self._encoded.clear()
        ticked, self._ticked = self._ticked, asyncio.Event()
        ticked.set()

    @contextmanager
    def viewing(self) -> Iterator[AsyncGenerator[bytes, None]]:
        """Count a viewer inside the context, and yield its events.

        Raises:
            FeedFull: there are too many.
        """
        if self.viewers >= self._most_viewers:
            raise FeedFull
        self.viewers += 1
        try:
            yield self._events()
        finally:
            self.viewers -= 1

    async def _events(self) -> AsyncGenerator[bytes, None]:
        """Yield the facts with the last minutes, then the newest state after each tick."""
        history = [tuple(sample) for sample in self._samples]
        facts = {
            **self._facts,
            "fields": ReplicaFigures._fields,
            "sample_fields": FleetFigures._fields,
            "history": history,
            "gap_s": self.gap_s,
        }
        yield _event("facts", facts)
        seen, whole = self._number, True
        while True:
            yield self._state(whole=whole)
            while seen == self._number:
                await self._ticked.wait()
            whole, seen = seen != self._number - 1, self._number

    def _state(self, *, whole: bool) -> bytes:
        if whole not in self._encoded:
            self._encoded[whole] = _event("state", self._as_json(whole=whole))
        return self._encoded[whole]

    def _as_json(self, *, whole: bool) -> dict[str, Any]:
        before, now = (_NOTHING if whole else self._before), self._now
        log, scale = self._source.decisions, self._source.scale()
        # Later ones come with the next state.
        decided = [one for one in self._decisions() if before.decision < one.number <= now.decision]
        offset_s = (0.0 if now.figures is None else now.figures.at_s) - now.clock_s
        return {
            "whole": whole,
            "rows": [row for name, row in now.rows.items() if before.rows.get(name) != row],
            "left": [name for name in before.rows if name not in now.rows],
            "fleet": now.figures,
            "events": self._fleet.events(before.event),
            "reasons": {} if log is None else log.counts,
            "decisions": [_shown(one, one.at_s + offset_s) for one in decided],
            "scale": None if scale is None else scale._asdict(),
        }

    def _decisions(self) -> list[Decided]:
        return [] if self._source.decisions is None else self._source.decisions.last()


def _shown(decided: Decided, at_s: float) -> dict[str, Any]:
    """Return a decision as viewers get it, with its Unix time."""
    shown = decided._replace(at_s=round(at_s, 1), first_token_s=round(decided.first_token_s, 2))
    return shown._asdict()


def _event(name: str, data: Any) -> bytes:
    return f"event: {name}\ndata: {json.dumps(data, separators=(',', ':'))}\n\n".encode()
