"""The plan of which requests leave a replica short of blocks, and for which lenders."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from adakv_serve.router.lending.leases import Resource


class Candidate(NamedTuple):
    """A compressed request whose state can move.

    blocks: blocks that it holds, and frees when it leaves.
    peak_blocks: the most blocks that it will hold until its expected end.
    state_bytes: size of its cache, at most.
    tokens: tokens that a recompute would prefill, prompt and answer so far.
    tokens_left: tokens that its answer is expected to add.
    moves: number of its moves so far.
    settled_s: time since it came back, infinite before its first move.
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

    blocks, host_bytes: memory of it that can still be leased.
    bytes_per_s: measured speed of a move to it, export and restore included.
    """

    replica_id: str
    blocks: int
    host_bytes: int
    bytes_per_s: float


class Move(NamedTuple):
    """A request's destination: `blocks` of a peer to go on in, or `host_bytes` to wait in."""

    request_id: str
    replica_id: str
    resource: Resource
    amount: int


@dataclass(frozen=True)
class SpillLimits:
    """Limits that keep moves worth their cost, and requests from moving back and forth.

    moves_of_a_request: most moves of one request.
    rest_s: time between two moves of a request.
    moves_at_once: most moves of one plan.
    worth: least ratio of the duration of a recompute to that of the move.
    spare_blocks: blocks of a peer that stay with its own requests.
    overhead_s: duration of a move of no bytes.
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
    """Return moves that free `needed_blocks`, or as many as are cheaper than recomputes.

    Candidates with the fewest bytes per block and remaining token come first. Each goes to the peer
    with the most room, if that is enough for its peak, so that it need not move again. If no peer
    has the blocks, it waits in the memory of a peer's host, but only until `pressing_blocks` are
    free: the engine preempts for those, and for others it would only wait in another's place.
    Moves that turn out unnecessary are left out. Equal arguments give equal moves.

    Args:
        pressing_blocks: blocks that running requests are about to be preempted for.
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
    """Return the duration of a recompute after a preemption."""
    return candidate.tokens / prefill_tokens_per_s


def move_s(candidate: Candidate, peer: Peer, limits: SpillLimits) -> float:
    """Return the duration of a move. A cache that waits does so at its destination."""
    return limits.overhead_s + candidate.state_bytes / peer.bytes_per_s


def _cost(candidate: Candidate) -> tuple[float, str]:
    held_for = candidate.blocks * max(candidate.tokens_left, 1.0)
    return candidate.state_bytes / max(held_for, 1.0), candidate.request_id


def _may_move(candidate: Candidate, limits: SpillLimits) -> bool:
    fresh = candidate.moves > 0 and candidate.settled_s < limits.rest_s
    return candidate.blocks > 0 and candidate.moves < limits.moves_of_a_request and not fresh


class _Way(NamedTuple):
    """An amount of a peer's resource, beside `spare` that the peer keeps."""

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
    """Leave out moves that later, larger ones made unnecessary."""
    kept = []
    for candidate, move in chosen:
        if candidate.blocks <= excess:
            excess -= candidate.blocks
        else:
            kept.append((candidate, move))
    return kept
