"""What the replicas report before, during and after a run: who they are, and what they hold."""

import asyncio
import time
from collections.abc import Iterable
from typing import NamedTuple

from adakv_serve.loadtest.servers.occupancy import Look, OccupancyWatch, ReplicaLoad

# Counts that are zero while no request is there.
_ZERO = (
    "running", "waiting", "prefill_tokens_queued", "blocks_compressed", "blocks_uncompressed",
    "blocks_reserved_growth", "blocks_lent", "blocks_borrowed",
)  # fmt: skip

_IDLE_LOOKS = 3


class Life(NamedTuple):
    """One life of a replica's engine."""

    replica_id: str
    epoch: int


def lives(loads: Iterable[ReplicaLoad]) -> set[Life]:
    return {Life(load["id"], load["epoch"]) for load in loads}


def held(loads: Iterable[ReplicaLoad]) -> dict[str, int]:
    """Return what the replicas still hold of requests, by count; nothing when they are idle."""
    sums: dict[str, int] = {}
    for load in loads:
        counts = {name: load[name] or 0 for name in _ZERO}
        counts["blocks_used"] = load["blocks_total"] - load["blocks_free"]
        for name, count in counts.items():
            sums[name] = sums.get(name, 0) + count
    return {name: count for name, count in sums.items() if count}


async def wait_until_idle(watch: OccupancyWatch, replicas: int, timeout_s: float) -> str | None:
    """Return None once the replicas hold nothing; what they hold when the time is over."""
    deadline = time.monotonic() + timeout_s
    first = len(watch.looks)
    while True:
        # One look may be older than the last request, or fall between two of its steps.
        recent = watch.looks[first:][-_IDLE_LOOKS:]
        if len(recent) == _IDLE_LOOKS and all(_is_idle(look, replicas) for look in recent):
            return None
        if time.monotonic() > deadline:
            return (
                f"{len(watch.latest)} of {replicas} replicas report, and hold {held(watch.latest)}"
            )
        await asyncio.sleep(0.1)


def _is_idle(look: Look, replicas: int) -> bool:
    return len(look.loads) == replicas and not held(look.loads)


def changed(before: set[Life], looks: Iterable[Look]) -> str | None:
    """Return which engines have died or begun since `before`, or None."""
    others: set[Life] = set()
    last: set[Life] = set()
    for look in looks:
        last = lives(look.loads)
        others |= last - before
    if others or last != before:
        gone = sorted(before - last)
        return f"engines have begun anew: {sorted(others)}; gone: {gone}"
    return None
