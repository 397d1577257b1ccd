"""Which requests leave a full replica, for which lenders, and when a recompute is cheaper."""

from dataclasses import replace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from adakv_serve.router.lending.spill_plan import (
    Candidate,
    Move,
    Peer,
    SpillLimits,
    move_s,
    plan_spill,
    recompute_s,
)

MIB = 1 << 20
LIMITS = SpillLimits()
SPEED = 500.0


def candidate(request_id: str, **fields: Any) -> Candidate:
    usual = {
        "blocks": 10, "peak_blocks": 12, "state_bytes": 14 * MIB, "tokens": 1500,
        "tokens_left": 100.0,
    }  # fmt: skip
    return Candidate(request_id, **{**usual, **fields})


def peer(replica_id: str, **fields: Any) -> Peer:
    return Peer(replica_id, **{"blocks": 100, "host_bytes": 0, "bytes_per_s": 1e9, **fields})


def plan(needed: int, candidates: list[Candidate], peers: list[Peer], **limits: Any) -> list[Move]:
    return plan_spill(needed, candidates, peers, SPEED, replace(LIMITS, **limits))


def test_one_that_will_hold_its_blocks_longest_goes_where_most_room_is() -> None:
    ending, beginning = candidate("ending", tokens_left=5), candidate("beginning")
    moves = plan(8, [ending, beginning], [peer("small", blocks=40), peer("large")])
    assert moves == [Move("beginning", "large", "blocks", 12)]


def test_it_goes_only_where_all_it_will_ever_hold_has_room() -> None:
    growing = candidate("growing", peak_blocks=30)
    assert plan(8, [growing], [peer("full", blocks=30)]) == []
    assert plan(8, [growing], [peer("roomy", blocks=30 + LIMITS.spare_blocks)]) != []


def test_rather_than_be_preempted_it_waits_in_a_hosts_memory() -> None:
    full = [peer("full", blocks=0, host_bytes=40 * MIB)]
    candidates = [candidate("one"), candidate("other")]
    assert plan_spill(18, candidates, full, SPEED, LIMITS, pressing_blocks=1) == [
        Move("one", "full", "host_bytes", 14 * MIB)
    ]
    # But not so that others may begin.
    assert plan_spill(18, candidates, full, SPEED, LIMITS) == []


def test_a_recompute_that_costs_little_is_not_worth_a_move() -> None:
    assert plan(8, [candidate("short", tokens=40)], [peer("large")]) == []
    assert plan(8, [candidate("one")], [peer("far", bytes_per_s=1e6)]) == []


def test_requests_do_not_move_to_and_fro() -> None:
    arrived = candidate("arrived", moves=1, settled_s=LIMITS.rest_s / 2)
    tired = candidate("tired", moves=LIMITS.moves_of_a_request)
    assert plan(8, [arrived, tired], [peer("large")]) == []
    rested = arrived._replace(settled_s=LIMITS.rest_s)
    assert len(plan(8, [rested, tired], [peer("large")])) == 1


def test_what_a_larger_one_frees_alone_is_not_moved_as_well() -> None:
    # Cheaper for each block, but too small by itself.
    small = candidate("small", blocks=2, peak_blocks=4, state_bytes=MIB, tokens_left=400)
    large = candidate("large", blocks=20, peak_blocks=24)
    moves = plan(15, [small, large], [peer("roomy")])
    assert [move.request_id for move in moves] == ["large"]


def test_nothing_moves_while_nothing_is_needed() -> None:
    assert plan(0, [candidate("one")], [peer("large")]) == []


CANDIDATES = st.lists(
    st.builds(
        Candidate,
        request_id=st.uuids().map(str),
        blocks=st.integers(0, 40),
        peak_blocks=st.integers(0, 60),
        state_bytes=st.integers(0, 64 * MIB),
        tokens=st.integers(1, 4000),
        tokens_left=st.floats(0, 2000),
        moves=st.integers(0, 3),
        settled_s=st.floats(0, 20),
    ),
    max_size=8,
)
PEERS = st.lists(
    st.builds(
        Peer,
        replica_id=st.text(min_size=1, max_size=4),
        blocks=st.integers(0, 120),
        host_bytes=st.integers(0, 128 * MIB),
        bytes_per_s=st.floats(1e6, 1e10),
    ),
    max_size=4,
    unique_by=lambda peer: peer.replica_id,
)


@given(needed=st.integers(0, 120), pressing=st.integers(0, 40), candidates=CANDIDATES, peers=PEERS)
def test_whatever_comes_a_plan_keeps_its_promises(
    needed: int, pressing: int, candidates: list[Candidate], peers: list[Peer]
) -> None:
    moves = plan_spill(needed, candidates, peers, SPEED, LIMITS, pressing)
    by_id = {one.request_id: one for one in candidates}
    assert len({move.request_id for move in moves}) == len(moves) <= LIMITS.moves_at_once
    for one in peers:
        mine = [move for move in moves if move.replica_id == one.replica_id]
        blocks = sum(move.amount for move in mine if move.resource == "blocks")
        assert blocks <= max(0, one.blocks - LIMITS.spare_blocks)
        parked = sum(move.amount for move in mine if move.resource == "host_bytes")
        assert parked <= one.host_bytes
        for move in mine:
            moved = by_id[move.request_id]
            assert moved.blocks > 0
            assert moved.moves < LIMITS.moves_of_a_request
            assert moved.moves == 0 or moved.settled_s >= LIMITS.rest_s
            cost = move_s(moved, one, LIMITS)
            assert cost * LIMITS.worth <= recompute_s(moved, SPEED) * (1 + 1e-9)
    freed = [by_id[move.request_id].blocks for move in moves]
    # If they free enough, each is needed.
    if sum(freed) >= needed:
        assert all(sum(freed) - one < needed for one in freed)
    # The order of the arguments plays no part.
    again = plan_spill(needed, candidates[::-1], peers[::-1], SPEED, LIMITS, pressing)
    assert again == moves
    parks = [by_id[move.request_id].blocks for move in moves if move.resource == "host_bytes"]
    assert sum(parks[:-1]) < max(pressing, 1)
