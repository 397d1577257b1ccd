"""How long a replica would make a request wait: the score that routing compares, in seconds.

Occupancy alone herds (every request goes to the emptiest replica until its report says otherwise),
and queue lengths are blind to long contexts. So all costs are put into one unit: the seconds before
the request's first token that this replica adds, and the seconds by which it slows its decoding.
"""

from collections.abc import Sequence
from typing import NamedTuple

from router.footprint import Footprint


class Speeds(NamedTuple):
    """How fast a replica works; only the proportions between them matter.

    prefill_tokens_per_s: prompt tokens computed in a second.
    decode_step_s: a decode step with one request, seconds.
    decode_step_s_per_request: what every further request adds to it.
    """

    prefill_tokens_per_s: float = 500.0
    decode_step_s: float = 0.034
    decode_step_s_per_request: float = 0.0024


class ReplicaView(NamedTuple):
    """One replica as routing sees it: its last report, and what was sent there since.

    room_blocks: free blocks that nobody is going to need: less the growth of running requests, what
        waiting ones take to start, and what was booked. Negative when overcommitted.
    used_blocks: blocks of running requests.
    running, waiting: requests, booked ones among the waiting.
    prefill_tokens: prompt tokens still to be computed, booked ones included.
    """

    replica_id: str
    blocks_total: int
    room_blocks: int
    used_blocks: int
    running: int
    waiting: int
    prefill_tokens: int


class Score(NamedTuple):
    """What a replica costs a request, in seconds; less is better.

    memory_s: waiting until enough blocks are free.
    prefill_s: the prompts before it, and its own that no cached prefix saves.
    decode_s: slower decoding in company.
    fits: whether its peak fits into the room.
    possible: whether it fits into the empty replica.
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
    """The cost of sending the request there.

    Args:
        cached_tokens: how much of its prompt the replica probably has in its prefix cache.
    """
    company = view.running + view.waiting
    step_s = speeds.decode_step_s + speeds.decode_step_s_per_request * company
    missing = footprint.peak_blocks - view.room_blocks
    memory_s = 0.0
    if missing > 0:
        # Blocks come back as requests end: each holds its blocks for its whole decoding, and
        # half of that is over on average.
        held_s = max(footprint.output_tokens, 1) * step_s / 2
        memory_s = held_s * missing / max(view.used_blocks, footprint.peak_blocks, 1)
    own = footprint.prompt_tokens - min(cached_tokens, footprint.prompt_tokens)
    prefill_s = (view.prefill_tokens + own) / speeds.prefill_tokens_per_s
    decode_s = footprint.output_tokens * speeds.decode_step_s_per_request * company
    return Score(
        view.replica_id,
        memory_s,
        prefill_s,
        decode_s,
        cached_tokens,
        fits=missing <= 0,
        possible=footprint.peak_blocks <= view.blocks_total,
    )


def ranked(scores: Sequence[Score]) -> list[Score]:
    """Best first: those that can ever hold the request, by their cost; equals as they come."""
    return sorted(scores, key=lambda s: (not s.possible, s.total_s))


def reason(best: Score, others: Sequence[Score]) -> str:
    """Why the best is the best, as one word for logs and metrics."""
    if not best.possible:
        return "fits_nowhere"
    if not best.fits:
        return "least_wait"
    if best.cached_tokens and all(best.cached_tokens > other.cached_tokens for other in others):
        return "affinity"
    if others and not any(other.fits for other in others):
        return "only_room"
    return "least_cost"
