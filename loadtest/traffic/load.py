"""The state of one running load test: the next session, and the answers so far."""

import random
import time
from collections.abc import Iterable
from typing import NamedTuple, Self

from adakv_serve.loadtest.client.records import Record
from adakv_serve.loadtest.traffic.workloads import Session


class Due(NamedTuple):
    """A session, and when it begins: seconds from the start, None for at once."""

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
        self._sessions = iter(sessions)
        self._rate_per_s = rate_per_s
        self._rng = rng or random.Random()
        self._at_s = 0.0
        self._recorded_from_s: float | None = None
        self._is_recorded = False

    @classmethod
    def replay(cls, sessions: list[Session]) -> Self:
        """Make a schedule of recorded times; the first session after the warm-up begins at once."""
        schedule = cls(sessions)
        schedule._is_recorded = True
        return schedule

    def untimed(self) -> Session | None:
        """Return the next session, to begin at once; None when there are no more."""
        return next(self._sessions, None)

    def next(self) -> Due | None:
        """Return the next session at its time; None when there are no more."""
        session = self.untimed()
        if session is None:
            return None
        if self._is_recorded:
            at_s = session.at_s or 0.0
            if self._recorded_from_s is None:
                self._recorded_from_s = at_s
            return Due(session, at_s - self._recorded_from_s)
        if self._rate_per_s is None:
            return Due(session, None)
        due = Due(session, self._at_s)
        self._at_s += self._rng.expovariate(self._rate_per_s)
        return due


class Load:
    """The load that all users of a process share; independent of Locust and HTTP.

    The warm-up comes first, and nothing else until all of it is answered; then the clock of the
    test starts.
    """

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
        self._requests = requests
        self._begun = 0
        self._active = 0
        self._open_sessions = 0
        self._exhausted = False
        self._is_warm = warmup == 0
        self._started = time.perf_counter()

    def start(self) -> None:
        """Start the clock of the test."""
        self._started = time.perf_counter()

    def elapsed_s(self) -> float:
        return time.perf_counter() - self._started

    def must_wait(self) -> bool:
        """Return whether warm-up requests are still open; start the clock after the last one."""
        if not self._is_warm and self._begun >= self._warmup and self._active == 0:
            self._is_warm, self._begun = True, 0
            self.start()
        return not self._is_warm and self._begun >= self._warmup

    def next_session(self) -> Due | None:
        """Return what to do next, unless it `must_wait`; None when nothing is left.

        The caller ends each with `end_session`.
        """
        due = None
        if not self._is_warm:
            session = self._schedule.untimed()
            if session is None:
                self._is_warm = True
            else:
                # One request of each, so that the warm-up takes as many sessions every time.
                due = Due(session._replace(turns=session.turns[:1]), None)
        elif not self._is_enough():
            due = self._schedule.next()
        if due is None:
            self._exhausted = True
            return None
        self._open_sessions += 1
        return due

    def begin_request(self) -> bool:
        """Return whether another request may be sent now; the caller ends it with `end_request`."""
        if self._is_enough():
            return False
        self._begun += 1
        self._active += 1
        return True

    def end_request(self, record: Record) -> bool:
        """Keep the record and return whether it counts; those of the warm-up do not."""
        self._active -= 1
        if self._is_warm:
            self.records.append(record)
        return self._is_warm

    def end_session(self) -> None:
        """Count a session of `next_session` as over."""
        self._open_sessions -= 1

    def is_over(self) -> bool:
        """Return whether nothing is left to do and nothing is being done."""
        if self._active or not self._is_warm:
            return False
        return self._is_enough() or (self._exhausted and self._open_sessions == 0)

    def _is_enough(self) -> bool:
        most = self._requests if self._is_warm else self._warmup
        return most is not None and self._begun >= most
