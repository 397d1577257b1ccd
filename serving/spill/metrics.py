"""Ray metrics of requests that have moved."""

from typing import TYPE_CHECKING

from ray.serve import metrics

if TYPE_CHECKING:
    from serving.spill.move import MoveReport


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
