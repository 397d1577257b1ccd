"""Samples of what a deployment's processes hold, and of what its replicas report."""

from collections.abc import Iterator
from contextlib import suppress

import psutil

from adakv_serve.loadtest.servers.family import family
from adakv_serve.loadtest.servers.occupancy import Look
from adakv_serve.loadtest.soaking.slopes import Limit, Sample, Trend, trend

# By measure. 24 MiB an hour are 4 GB a week.
LIMITS = {
    "memory_mib": Limit(per_hour=24, noise=24),
    "files": Limit(per_hour=4, noise=4),
    "threads": Limit(per_hour=4, noise=4),
    "connections": Limit(per_hour=4, noise=6),
    "blocks_used_percent": Limit(per_hour=4, noise=15),
    "sessions_held": Limit(per_hour=200, noise=60),
    "waiting": Limit(per_hour=8, noise=8),
    "store_keys": Limit(per_hour=8, noise=8),
}
# One measure of one process, replica or store.
Name = tuple[str, str]


class Samples:
    """All samples of a run, by what was measured."""

    def __init__(self) -> None:
        self.series: dict[Name, list[Sample]] = {}

    def take(self, at_s: float, look: Look | None) -> None:
        """Add a sample of every process below this one, and of the replicas' last reports."""
        for role, process in family():
            # It may end meanwhile.
            with suppress(psutil.Error):
                self._add_process(f"{role} {process.pid}", at_s, process)
        if look is not None:
            self.add_look(at_s, look)

    def add_look(self, at_s: float, look: Look) -> None:
        """Add what the replicas report, and how many keys the store has."""
        self._add("store", "store_keys", at_s, look.store_keys)
        for load in look.loads:
            subject = f"reported by {load['id']}"
            used = 1 - load["blocks_free"] / max(load["blocks_total"], 1)
            self._add(subject, "blocks_used_percent", at_s, 100 * used)
            self._add(subject, "sessions_held", at_s, load["sessions_held"])
            self._add(subject, "waiting", at_s, load["waiting"])

    def _add_process(self, subject: str, at_s: float, process: psutil.Process) -> None:
        with process.oneshot():
            values = {
                "memory_mib": process.memory_info().rss / (1 << 20),
                "files": process.num_fds(),
                "threads": process.num_threads(),
                "connections": len(process.net_connections()),
            }
        for measure, value in values.items():
            self._add(subject, measure, at_s, value)

    def _add(self, subject: str, measure: str, at_s: float, value: float) -> None:
        self.series.setdefault((subject, measure), []).append(Sample(at_s, value))

    def trends(self, until_s: float) -> dict[Name, Trend]:
        """Return the trends of what was there in the whole second half of the run."""
        found = {
            name: trend(samples, until_s, LIMITS[name[1]]) for name, samples in self.series.items()
        }
        return {name: one for name, one in found.items() if one is not None}


def table(trends: dict[Name, Trend]) -> Iterator[str]:
    """Yield a line for each trend: the ends of the second half, slope and least slope, limit."""
    width = max((len(subject) for subject, _ in trends), default=0)
    heads = f"{'half':>9} {'end':>9} {'an hour':>9} {'at least':>9} {'limit':>7}"
    yield f"{'':{width}} {'':19} {heads}"
    for (subject, measure), one in sorted(trends.items()):
        mark = "  GROWS" if one.grows else ""
        yield (
            f"{subject:{width}} {measure:19} {one.first:9.1f} {one.last:9.1f} {one.per_hour:+9.1f}"
            f" {one.least_per_hour:+9.1f} {LIMITS[measure].per_hour:7.0f}{mark}"
        )
