"""Ray metrics of requests and of held caches that have moved."""

import json
import logging
from typing import TYPE_CHECKING, Any

from ray.serve import metrics

if TYPE_CHECKING:
    from adakv_serve.serving.spill.move import MoveReport
    from adakv_serve.serving.spill.sessions import SessionMove


logger = logging.getLogger("ray.serve")


class SpillMetrics:
    """Counts moves, their bytes and their seconds."""

    def __init__(self) -> None:
        self._moves = metrics.Counter(
            "adakv_spill_moves",
            "Requests that left this replica: gone on elsewhere, or come back to be recomputed",
            ("outcome",),
        )
        self._bytes = metrics.Counter(
            "adakv_spill_bytes", "Bytes of the compressed caches that left this replica"
        )
        self._seconds = metrics.Histogram(
            "adakv_spill_move_seconds",
            "From asking a request to leave to its first output elsewhere",
            boundaries=[0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0],
        )

    def note(self, report: "MoveReport") -> None:
        self._moves.inc(tags={"outcome": "moved" if report.problem is None else "came_back"})
        if report.problem is None:
            self._bytes.inc(report.state_bytes)
            self._seconds.observe(report.seconds)


class SessionMetrics:
    """Counts held caches that have come for a request or were handed over, and their bytes."""

    def __init__(self) -> None:
        labels: Any = ("way", "outcome")  # Ray annotates a tuple of one.
        self._moves = metrics.Counter(
            "adakv_session_moves",
            "Held caches that came to this replica for a request (fetched), or that it sent to "
            "another one because it was to go (handed_over); lost ones were not whole",
            labels,
        )
        self._bytes = metrics.Counter(
            "adakv_session_moved_bytes", "Bytes of the held caches that have moved", ("way",)
        )

    def note(self, move: "SessionMove") -> None:
        outcome = "moved" if move.is_whole else "lost"
        self._moves.inc(tags={"way": move.way, "outcome": outcome})
        if move.is_whole and move.nbytes:
            self._bytes.inc(move.nbytes, tags={"way": move.way})
        logger.info("session moved %s", json.dumps(move._asdict()))
