"""A replica's metrics on Ray's Prometheus endpoint: compressed prompts, and KV memory."""

from typing import Any

from ray.serve.metrics import Counter, Gauge, Histogram

from adakv_serve.router.ledger.occupancy import Occupancy
from adakv_worker.frontend.metric_names import (
    DECODE_EVICTIONS,
    HELD_BLOCKS,
    OF_COMPRESSED,
    REQUESTS,
    SELECTION_FAILURES,
    SESSIONS,
    SESSIONS_HELD,
    Metric,
    amounts,
    request_labels,
    session_labels,
)
from adakv_worker.messages import Proof


class CompressionMetrics:
    """Counts completed prompts by policy and by the reason why they were not compressed."""

    def __init__(self) -> None:
        labels: Any = ("policy", "skipped")  # Ray annotates a tuple of one.
        self._requests = Counter(REQUESTS.name, REQUESTS.description, labels)
        by_session: Any = ("source", "skipped")
        self._sessions = Counter(SESSIONS.name, SESSIONS.description, by_session)
        self._held = {metric: _make(metric) for metric in OF_COMPRESSED}

    def note(self, proof: Proof) -> None:
        """Count one prompt."""
        self._requests.inc(tags=request_labels(proof))
        if (session := session_labels(proof)) is not None:
            self._sessions.inc(tags=session)
        for metric, amount in amounts(proof).items():
            held = self._held[metric]
            if isinstance(held, Counter):
                # Ray's counters refuse 0, and an error here would end the engine.
                if amount:
                    held.inc(amount)
            else:
                held.observe(amount)


def _make(metric: Metric) -> Counter | Histogram:
    if metric.buckets is None:
        return Counter(metric.name, metric.description)
    return Histogram(metric.name, metric.description, list(metric.buckets))


class OccupancyMetrics:
    """Gauges and counters of the KV memory, from the occupancy reports."""

    def __init__(self) -> None:
        self._blocks = Gauge(
            "adakv_blocks",
            "KV blocks: free, held by compressed and by uncompressed requests, reserved for "
            "growth, lent to and borrowed from other replicas",
            ("state",),
        )
        self._waiting_blocks = Gauge(
            "adakv_waiting_blocks", "KV blocks that the waiting requests need to start"
        )
        self._prefill_tokens = Gauge(
            "adakv_prefill_tokens_queued", "Prompt tokens that are not computed yet"
        )
        self._sessions_held = Gauge(SESSIONS_HELD.name, SESSIONS_HELD.description)
        self._held_blocks = Gauge(HELD_BLOCKS.name, HELD_BLOCKS.description)
        self._recomputed = _Total(
            "adakv_recomputed_tokens",
            "Tokens computed again, after a preemption or a cache lost in a move",
        )
        self._evictions = _Total(DECODE_EVICTIONS.name, DECODE_EVICTIONS.description)
        self._failures = _Total(SELECTION_FAILURES.name, SELECTION_FAILURES.description)

    def note(self, occupancy: Occupancy) -> None:
        """Show one report."""
        for state, blocks in (
            ("free", occupancy.blocks_free),
            ("compressed", occupancy.blocks_compressed),
            ("uncompressed", occupancy.blocks_uncompressed),
            ("reserved_growth", occupancy.blocks_reserved_growth),
            ("lent", occupancy.blocks_lent),
            ("borrowed", occupancy.blocks_borrowed),
        ):
            self._blocks.set(blocks, tags={"state": state})
        self._waiting_blocks.set(occupancy.waiting_blocks or 0)
        self._prefill_tokens.set(occupancy.prefill_tokens_queued)
        self._sessions_held.set(occupancy.sessions_held)
        self._held_blocks.set(occupancy.blocks_held)
        self._recomputed.raise_to(occupancy.recomputed_tokens)
        self._evictions.raise_to(occupancy.decode_evictions)
        self._failures.raise_to(occupancy.selection_failures)


class TaskMetrics:
    """Counts failures of background tasks, of whatever process."""

    def __init__(self) -> None:
        self._failures = Counter(
            "adakv_task_failures", "Failures of background tasks, which start again", ("task",)
        )

    def note(self, name: str) -> None:
        """Count one failure."""
        self._failures.inc(tags={"task": name})


class _Total:
    """A counter that is set to totals; None leaves it unchanged."""

    def __init__(self, name: str, description: str) -> None:
        self._counter = Counter(name, description)
        self._total = 0

    def raise_to(self, total: int | None) -> None:
        if total is not None and total > self._total:
            self._counter.inc(total - self._total)
            self._total = total
