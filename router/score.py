"""The score that routing compares: seconds that a replica costs a request.

Routing by occupancy alone sends every request to the emptiest replica until its next report, and
queue lengths ignore long contexts. So the score adds up seconds: those before the request's first
token, and those by which company slows its decoding.
"""

from collections.abc import Sequence
from typing import NamedTuple

from adakv_serve.router.footprint import Footprint


class Speeds(NamedTuple):
    """Speeds of a replica; only their proportions matter.

    prefill_tokens_per_s: prompt tokens computed per second.
    decode_step_s: seconds of a decode step with one request.
    decode_step_s_per_request: seconds that every further request adds to a step.
    """

    prefill_tokens_per_s: float = 500.0
    decode_step_s: float = 0.034
    decode_step_s_per_request: float = 0.0024


class ReplicaView(NamedTuple):
    """One replica by its last report and the requests booked since.

    room_blocks: free blocks less the growth of running requests, the start of waiting ones, and
        bookings. Negative when overcommitted.
    used_blocks: blocks of running requests.
    running: running requests.
    waiting: waiting and booked requests.
    prefill_tokens: prompt tokens still to be computed, booked ones included.
    slowness: how many times as slow as the others it is, see `router.slowness`.
    """

    replica_id: str
    blocks_total: int
    room_blocks: int
    used_blocks: int
    running: int
    waiting: int
    prefill_tokens: int
    slowness: float = 1.0


class Score(NamedTuple):
    """Cost of a request on a replica, in seconds; less is better.

    memory_s: wait until enough blocks are free.
    prefill_s: prefill of the prompts before it, and of its own without the cached prefix.
    decode_s: slower decoding in company, or on a slow replica.
    fits: whether its peak fits into the room.
    possible: whether its peak fits into the empty replica.
    """

    replica_id: str
    memory_s: float
    prefill_s: float
    decode_s: float
    cached_tokens: int
    fits: bool
    possible: bool

    @property
    def total_s(self) -> float:
        return self.memory_s + self.prefill_s + self.decode_s


def score(view: ReplicaView, footprint: Footprint, cached_tokens: int, speeds: Speeds) -> Score:
    """Return the cost of the request on a replica.

    Args:
        cached_tokens: tokens of the prompt that are probably in the replica's prefix cache.
    """
    company = view.running + view.waiting
    step_s = speeds.decode_step_s + speeds.decode_step_s_per_request * company
    missing = footprint.peak_blocks - view.room_blocks
    memory_s = 0.0
    if missing > 0:
        # Requests return their blocks when they end, on average after half of a decoding; long
        # prompts with short answers hold most of theirs while they are computed.
        computed_s = footprint.prompt_tokens / speeds.prefill_tokens_per_s
        held_s = computed_s + max(footprint.output_tokens, 1) * step_s / 2
        memory_s = held_s * missing / max(view.used_blocks, footprint.peak_blocks, 1)
    own = footprint.prompt_tokens - min(cached_tokens, footprint.prompt_tokens)
    prefill_s = (view.prefill_tokens + own) / speeds.prefill_tokens_per_s
    decode_s = footprint.output_tokens * speeds.decode_step_s_per_request * company
    return Score(
        view.replica_id,
        memory_s * view.slowness,
        prefill_s * view.slowness,
        decode_s * view.slowness + (view.slowness - 1) * footprint.output_tokens * step_s,
        cached_tokens,
        fits=missing <= 0,
        possible=footprint.peak_blocks <= view.blocks_total,
    )


def ranked(scores: Sequence[Score]) -> list[Score]:
    """Sort by cost, with replicas that can never hold the request last."""
    return sorted(scores, key=lambda s: (not s.possible, s.total_s))


def reason(best: Score, others: Sequence[Score]) -> str:
    """Return why the best is the best, as one word for logs and metrics."""
    if not best.possible:
        return "fits_nowhere"
    if not best.fits:
        return "least_wait"
    if best.cached_tokens and all(best.cached_tokens > other.cached_tokens for other in others):
        return "affinity"
    if others and not any(other.fits for other in others):
        return "only_room"
    return "least_cost"
