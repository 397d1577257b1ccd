"""The state of one running load test: what is asked next, and what has been answered."""

import random
import time
from collections.abc import Iterable, Iterator
from typing import NamedTuple, Self

from loadtest.records import Record
from loadtest.workloads import Session


class Due(NamedTuple):
    """A session, and when it shall begin: seconds from the start, None for at once."""

    session: Session
    at_s: float | None


class Schedule:
    """When sessions begin: at once (closed loop), by a Poisson process, or as recorded."""

    def __init__(
        self,
        sessions: Iterable[Session],
        rate_per_s: float | None = None,
        rng: random.Random | None = None,
    ) -> None:
        """
        Args:
            rate_per_s: of an open loop; None for a closed one.
        """
        self._due = self._timed(iter(sessions), rate_per_s, rng or random.Random())

    @classmethod
    def replay(cls, sessions: list[Session]) -> Self:
        """Sessions that know their times, the first of them at once."""
        schedule = cls(())
        first = min((session.at_s or 0.0 for session in sessions), default=0.0)
        schedule._due = (Due(session, (session.at_s or 0.0) - first) for session in sessions)
        return schedule

    def next(self) -> Due | None:
        """None when there are no more."""
        return next(self._due, None)

    @staticmethod
    def _timed(
        sessions: Iterator[Session], rate_per_s: float | None, rng: random.Random
    ) -> Iterator[Due]:
        at_s = 0.0
        for session in sessions:
            yield Due(session, None if rate_per_s is None else at_s)
            if rate_per_s is not None:
                at_s += rng.expovariate(rate_per_s)


class Load:
    """Shared by all users of a process. Knows neither Locust nor HTTP."""

    def __init__(
        self, model: str, schedule: Schedule, warmup: int = 0, requests: int | None = None
    ) -> None:
        """
        Args:
            warmup: requests before those that count.
            requests: how many count; None for no end.
        """
        self.model = model
        self.records: list[Record] = []
        self._schedule = schedule
        self._warmup = warmup
        self._most = None if requests is None else warmup + requests
        self._begun = 0
        self._open_sessions = 0
        self._exhausted = False
        self._started = time.perf_counter()

    def start(self) -> None:
        """The time of the test runs from now on."""
        self._started = time.perf_counter()

    def elapsed_s(self) -> float:
        return time.perf_counter() - self._started

    def next_session(self) -> Due | None:
        """What to do next; None when nothing is left. Each is to be ended by `end_session`."""
        due = None if self._is_enough() else self._schedule.next()
        if due is None:
            self._exhausted = True
            return None
        self._open_sessions += 1
        return due

    def begin_request(self) -> int | None:
        """The number of a request that may be sent now; None when enough were."""
        if self._is_enough():
            return None
        self._begun += 1
        return self._begun - 1

    def end_session(self) -> None:
        self._open_sessions -= 1

    def counts(self, number: int) -> bool:
        """Whether a request is not of the warm-up."""
        return number >= self._warmup

    def is_over(self) -> bool:
        """Whether nothing is left to do and nothing is being done."""
        return self._exhausted and self._open_sessions == 0

    def _is_enough(self) -> bool:
        return self._most is not None and self._begun >= self._most
