"""Which compressed requests leave a replica that runs out of blocks, and for where. Pure."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from router.lending.leases import Resource


class Candidate(NamedTuple):
    """A compressed request whose state can move.

    blocks: what it holds, and frees when it leaves.
    peak_blocks: what it will hold at its expected end.
    state_bytes: of its cache as it travels, at most.
    tokens: what a recompute would prefill, prompt and answer so far.
    tokens_left: what its answer is expected to bring still.
    moves: how often it has moved.
    settled_s: how long ago it came here, or began.
    """

    request_id: str
    blocks: int
    peak_blocks: int
    state_bytes: int
    tokens: int
    tokens_left: float
    moves: int = 0
    settled_s: float = float("inf")


class Peer(NamedTuple):
    """A replica that lends.

    blocks, host_bytes: what can still be leased of it.
    bytes_per_s: how fast a state gets there, export and restore included, as measured.
    """

    replica_id: str
    blocks: int
    host_bytes: int
    bytes_per_s: float


class Move(NamedTuple):
    """A request's way: `blocks` of the peer, where it goes on, or `host_bytes`, where it waits."""

    request_id: str
    replica_id: str
    resource: Resource
    amount: int


@dataclass(frozen=True)
class SpillLimits:
    """What keeps moves worth their cost, and requests from moving to and fro.

    moves_of_a_request: before it stays where it is.
    rest_s: after a move before the next.
    moves_at_once: of one replica.
    worth: how many times as long a recompute must take as the move.
    spare_blocks: of a peer, left to its own requests.
    overhead_s: of a move of no bytes at all.
    """

    moves_of_a_request: int = 2
    rest_s: float = 5.0
    moves_at_once: int = 4
    worth: float = 2.0
    spare_blocks: int = 4
    overhead_s: float = 0.05


def plan_spill(
    needed_blocks: int,
    candidates: Iterable[Candidate],
    peers: Sequence[Peer],
    prefill_tokens_per_s: float,
    limits: SpillLimits,
    pressing_blocks: int = 0,
) -> list[Move]:
    """Moves that free `needed_blocks`, or as many as moving frees at less cost than preempting.

    First those that cost the fewest bytes for each block and token for which they would hold it;
    each to the peer with the most room, if that is enough for all it will ever hold, so that it
    need not move again. While `pressing_blocks`, which are going to be preempted for, are not free,
    others wait in the memory of some peer's host: for less than that it would only be another one
    that waits. Of what was chosen, none is left that is not needed. Equal arguments give equal
    moves.
    """
    room = {peer.replica_id: peer for peer in peers}
    chosen: list[tuple[Candidate, Move]] = []
    freed = 0
    for candidate in sorted(candidates, key=_cost):
        if freed >= needed_blocks or len(chosen) >= limits.moves_at_once:
            break
        if not _may_move(candidate, limits):
            continue
        ways = _ways(candidate, limits, may_wait=freed < pressing_blocks)
        move = _move(candidate, ways, room.values(), prefill_tokens_per_s, limits)
        if move is None:
            continue
        room[move.replica_id] = _without(room[move.replica_id], move)
        chosen.append((candidate, move))
        freed += candidate.blocks
    return [move for _, move in _needed(chosen, freed - needed_blocks)]


def recompute_s(candidate: Candidate, prefill_tokens_per_s: float) -> float:
    """What a preemption would cost."""
    return candidate.tokens / prefill_tokens_per_s


def move_s(candidate: Candidate, peer: Peer, limits: SpillLimits) -> float:
    """What a move costs; a cache that waits does so where it will be used."""
    return limits.overhead_s + candidate.state_bytes / peer.bytes_per_s


def _cost(candidate: Candidate) -> tuple[float, str]:
    held_for = candidate.blocks * max(candidate.tokens_left, 1.0)
    return candidate.state_bytes / max(held_for, 1.0), candidate.request_id


def _may_move(candidate: Candidate, limits: SpillLimits) -> bool:
    fresh = candidate.moves > 0 and candidate.settled_s < limits.rest_s
    return candidate.blocks > 0 and candidate.moves < limits.moves_of_a_request and not fresh


class _Way(NamedTuple):
    """What a move would take of a peer, which keeps `spare` for itself."""

    resource: Resource
    amount: int
    spare: int


def _ways(candidate: Candidate, limits: SpillLimits, *, may_wait: bool) -> list[_Way]:
    ways = [_Way("blocks", candidate.peak_blocks, limits.spare_blocks)]
    if may_wait:
        ways.append(_Way("host_bytes", candidate.state_bytes, 0))
    return ways


def _move(
    candidate: Candidate,
    ways: Iterable[_Way],
    peers: Collection[Peer],
    prefill_tokens_per_s: float,
    limits: SpillLimits,
) -> Move | None:
    most_s = recompute_s(candidate, prefill_tokens_per_s)
    for resource, amount, spare in ways:
        able = [
            (getattr(peer, resource), peer.replica_id)
            for peer in peers
            if getattr(peer, resource) - spare >= amount
            and limits.worth * move_s(candidate, peer, limits) <= most_s
        ]
        if able:
            return Move(candidate.request_id, max(able)[1], resource, amount)
    return None


def _without(peer: Peer, move: Move) -> Peer:
    if move.resource == "blocks":
        return peer._replace(blocks=peer.blocks - move.amount)
    return peer._replace(host_bytes=peer.host_bytes - move.amount)


def _needed(chosen: list[tuple[Candidate, Move]], excess: int) -> list[tuple[Candidate, Move]]:
    """Leaves out what was chosen for too little, once something larger came after it."""
    kept = []
    for candidate, move in chosen:
        if candidate.blocks <= excess:
            excess -= candidate.blocks
        else:
            kept.append((candidate, move))
    return kept
