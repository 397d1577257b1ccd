"""How much slower than the rest of its fleet a replica computes."""

import math
import statistics
from collections.abc import Iterable

from adakv_serve.router.ledger.occupancy import Occupancy
from adakv_serve.router.score import Speeds

# Time over which older observations fade, and the busy time from which on they count.
_FADING_S = 120.0
_ENOUGH_S = 20.0
# Reports are at most so far apart, unless some were lost.
_LONGEST_GAP_S = 5.0
# Below it a replica counts as fast as the others: loads differ, and so do their costs.
_NOTABLE = 1.5
# A replica that hangs is not endlessly slow.
_LONGEST_RATIO = 100.0
_MOST = 10.0


class Slowness:
    """Busy time of one replica against the time that its work takes at the expected speeds.

    A replica may share its machine, run hot, or have an older card. All tokens that it reports
    count, also those of a report that comes after its work has ended.
    """

    def __init__(self, speeds: Speeds) -> None:
        self._speeds = speeds
        self._busy_s = self._expected_s = 0.0
        self._was_busy = False
        self._at_s: float | None = None

    def note(self, report: Occupancy, now_s: float) -> None:
        """Take a report into account."""
        if report.decode_steps_per_s is None:
            return
        if self._at_s is not None:
            gap_s = min(max(0.0, now_s - self._at_s), _LONGEST_GAP_S)
            fading = math.exp(-gap_s / _FADING_S)
            self._busy_s = fading * self._busy_s + gap_s * self._was_busy
            self._expected_s = fading * self._expected_s + gap_s * self._load(
                report, report.decode_steps_per_s
            )
        self._at_s = now_s
        self._was_busy = report.running + report.waiting > 0

    def _load(self, report: Occupancy, steps_per_s: float) -> float:
        """Return the share of the time that the reported work takes at the expected speeds."""
        speeds = self._speeds
        alone_s = speeds.decode_step_s - speeds.decode_step_s_per_request
        prefill = report.prefill_tokens_per_s / speeds.prefill_tokens_per_s
        tokens = report.decode_tokens_per_s * speeds.decode_step_s_per_request
        return prefill + tokens + steps_per_s * alone_s

    @property
    def ratio(self) -> float | None:
        """Busy time over expected time; None before there is enough of it."""
        if self._busy_s < _ENOUGH_S:
            return None
        return self._busy_s / max(self._expected_s, self._busy_s / _LONGEST_RATIO)


def usual_ratio(ratios: Iterable[float | None]) -> float | None:
    """Return the fleet's usual ratio, None where fewer than two replicas have one."""
    known = [ratio for ratio in ratios if ratio is not None]
    return statistics.median_low(known) if len(known) > 1 else None


def relative(ratio: float | None, usual: float | None) -> float:
    """Return how many times as slow as usual a replica is; 1 if that is not notable."""
    if ratio is None or usual is None or ratio < _NOTABLE * usual:
        return 1.0
    return min(ratio / usual, _MOST)
