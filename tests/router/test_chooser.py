"""Decisions, through the chooser: reports in, a ranking out."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adakv_serve.router.chooser import Chooser, Decision
from adakv_serve.router.footprint import Footprint
from adakv_serve.router.ledger.occupancy import Occupancy
from adakv_serve.router.ledger.prefixes import PrefixChange
from adakv_serve.router.local_view import LocalView
from adakv_serve.router.score import Speeds
from tests.router.occupancies import idle

SMALL = Footprint(5, 5, 100, 50)


def chooser(*reports: Occupancy, now_s: float = 0.0, speeds: Speeds | None = None) -> Chooser:
    chooser = Chooser(LocalView(), speeds, rng=random.Random(0))
    for report in reports:
        chooser.view.accept(report, now_s)
    return chooser


def decided(
    chooser: Chooser,
    *ids: str,
    footprint: Footprint = SMALL,
    now_s: float = 0.0,
    request_id: str = "decided",
) -> Decision:
    decision = chooser.choose(request_id, ids, footprint, now_s)
    assert decision is not None
    return decision


def test_every_replica_has_a_rank_of_its_own() -> None:
    decision = decided(chooser(idle("a"), idle("b"), idle("c")), "a", "b", "c")
    assert sorted(decision.replica_ids) == ["a", "b", "c"]
    assert len(decision.scores) == 3


def test_a_request_goes_where_its_footprint_fits() -> None:
    full = idle("full", blocks_free=10, running=3)
    roomy = idle("roomy", blocks_free=60, running=4)
    decision = decided(chooser(full, roomy), "full", "roomy", footprint=Footprint(30, 30, 900, 50))
    assert decision.replica_ids == ["roomy", "full"]
    assert decision.reason == "only_room"


def test_what_running_requests_will_grow_by_is_not_room() -> None:
    growing = idle("growing", blocks_free=60, blocks_reserved_growth=55, running=3)
    settled = idle("settled", blocks_free=40, running=3)
    big = Footprint(30, 30, 900, 50)
    assert decided(chooser(growing, settled), "growing", "settled", footprint=big).replica_ids == [
        "settled", "growing",
    ]  # fmt: skip


def test_a_prefill_backlog_counts_even_with_all_memory_free() -> None:
    busy = idle("busy", prefill_tokens_queued=20_000)
    quiet = idle("quiet", blocks_free=70, running=2)
    assert decided(chooser(busy, quiet), "busy", "quiet").replica_ids[0] == "quiet"


def test_requests_that_come_at_once_do_not_herd() -> None:
    ids = [f"r{index}" for index in range(4)]
    fleet = chooser(*(idle(i) for i in ids))
    # All are decided before any has arrived.
    sent = [decided(fleet, *ids, request_id=f"q{n}").replica_ids[0] for n in range(8)]
    assert {sent.count(i) for i in ids} == {2}
    for number, best in enumerate(sent):
        fleet.sent(f"q{number}", best, SMALL, 0.1)
    sent += [decided(fleet, *ids, request_id=f"r{n}").replica_ids[0] for n in range(8)]
    assert {sent.count(i) for i in ids} == {4}


def test_a_request_counts_only_where_it_went() -> None:
    fleet = chooser(idle("a"), idle("b"))
    big = Footprint(90, 90, 5000, 50)
    first, second = decided(fleet, "a", "b", footprint=big, request_id="big").replica_ids
    # The best was full after all.
    fleet.sent("big", second, big, 0.1)
    assert decided(fleet, "a", "b", now_s=0.1).replica_ids[0] == first


def test_a_request_that_is_decided_again_does_not_stand_in_its_own_way() -> None:
    fleet = chooser(idle("a"), idle("b", running=3))
    big = Footprint(90, 90, 5000, 50)
    for _ in range(3):
        assert decided(fleet, "a", "b", footprint=big).replica_ids[0] == "a"


def test_a_booking_ends_with_the_report_that_must_show_it() -> None:
    fleet = chooser(idle("a"), idle("b"))
    fleet.sent("earlier", "a", Footprint(90, 90, 5000, 50), 0.0)
    assert decided(fleet, "a", "b").replica_ids[0] == "b"
    # Made before the request arrived, and so without it.
    fleet.view.accept(idle("a", sequence=2), 0.1)
    assert decided(fleet, "a", "b", now_s=0.1).replica_ids[0] == "b"
    fleet.view.accept(idle("a", sequence=3), 0.5)
    assert {s.total_s for s in decided(fleet, "a", "b", now_s=0.5).scores} == {
        decided(fleet, "b", now_s=0.5).scores[0].total_s
    }


def test_repeated_prompts_between_two_reports_return_to_their_replica() -> None:
    fleet = chooser(idle("a"), idle("b"))
    prompt = Footprint(8, 8, 200, 2, tuple(range(6)))
    (first, *_) = decided(fleet, "a", "b", footprint=prompt, request_id="0").replica_ids
    fleet.sent("0", first, prompt, 0.0)
    fleet.view.answered("0")
    for number in map(str, range(1, 5)):
        # Even while the one before it runs.
        decision = decided(fleet, "a", "b", footprint=prompt, request_id=number)
        assert decision.replica_ids[0] == first
        fleet.sent(number, first, prompt, 0.0)
        fleet.view.answered(number)
        fleet.view.unbook(str(int(number) - 1))


def test_the_next_turn_goes_where_the_last_one_was() -> None:
    fleet = chooser(idle("a"), idle("b"))
    history = tuple(range(20))
    fleet.sent("earlier", "b", Footprint(25, 25, 640, 50, history), 0.0)
    fleet.view.accept(idle("b", sequence=2), 1.0)
    fleet.view.accept(idle("a", sequence=2), 1.0)
    turn = Footprint(30, 30, 800, 50, (*history, 20, 21))
    decision = decided(fleet, "a", "b", footprint=turn, now_s=1.0)
    assert decision.replica_ids[0] == "b"
    assert decision.reason == "affinity"
    assert decision.scores[0].cached_tokens == 20 * 32


def test_affinity_yields_when_the_favoured_replica_is_overloaded() -> None:
    fleet = chooser(idle("a"), idle("b"))
    history = tuple(range(20))
    fleet.sent("earlier", "b", Footprint(25, 25, 640, 50, history), 0.0)
    fleet.view.accept(idle("b", sequence=2, prefill_tokens_queued=9000), 1.0)
    turn = Footprint(30, 30, 800, 50, history)
    assert decided(fleet, "a", "b", footprint=turn, now_s=1.0).replica_ids[0] == "a"


def test_a_report_of_a_prefix_cache_corrects_the_affinity() -> None:
    fleet = chooser(idle("a"), idle("b"))
    history = tuple(range(20))
    turn = Footprint(25, 25, 640, 50, history)
    # Another router sent the first turn there.
    fleet.learn(PrefixChange(replica_id="b", stored=list(history)))
    decision = decided(fleet, "a", "b", footprint=turn)
    assert (decision.replica_ids[0], decision.reason) == ("b", "affinity")
    fleet.learn(PrefixChange(replica_id="b", removed=list(history[3:])))
    assert decided(fleet, "a", "b", footprint=turn).scores[0].cached_tokens == 3 * 32
    fleet.learn(PrefixChange(replica_id="b", cleared=True))
    assert decided(fleet, "a", "b", footprint=turn).scores[0].cached_tokens == 0


def test_a_request_that_fits_nowhere_goes_where_it_waits_least() -> None:
    worse = idle("worse", blocks_free=0, running=9, waiting=5, waiting_blocks=200)
    better = idle("better", blocks_free=20, running=2)
    decision = decided(chooser(worse, better), "worse", "better", footprint=Footprint(50, 50, 1, 1))
    assert decision.replica_ids[0] == "better"
    assert decision.reason == "least_wait"
    decision = decided(chooser(worse, better), "worse", "better", footprint=Footprint(500, 9, 1, 1))
    assert decision.reason == "fits_nowhere"


def test_stale_and_unknown_replicas_are_left_out() -> None:
    fleet = chooser(idle("old"), now_s=0.0)
    fleet.view.accept(idle("fresh"), 3.0)
    assert decided(fleet, "old", "fresh", "new", now_s=3.0).replica_ids == ["fresh"]
    assert fleet.choose("one", ["old"], SMALL, 3.0) is None
    fleet.retain({"old"})
    assert fleet.choose("one", ["fresh"], SMALL, 3.0) is None


def test_only_the_given_candidates_are_ranked() -> None:
    fleet = chooser(idle("a"), idle("b"))
    assert decided(fleet, "b").replica_ids == ["b"]


def test_the_decision_explains_itself_in_one_line() -> None:
    speeds = Speeds(prefill_tokens_per_s=300.0, decode_step_s=0.1, decode_step_s_per_request=0.1)
    fleet = chooser(idle("a", blocks_free=10, running=2), speeds=speeds)
    footprint = Footprint(peak_blocks=40, steady_blocks=7, prompt_tokens=100, output_tokens=3)
    assert decided(fleet, "a", footprint=footprint).log_line(footprint) == {
        "reason": "least_wait",
        "replica": "a",
        "peak_blocks": 40,
        "steady_blocks": 7,
        "prompt_tokens": 100,
        "output_tokens": 3,
        "candidates": [
            {
                "replica": "a",
                "total_s": 1.194,
                "memory_s": 0.261,
                "prefill_s": 0.333,
                "decode_s": 0.6,
                "cached_tokens": 0,
                "fits": False,
            }
        ],
    }


def test_a_replica_that_has_gone_is_forgotten_with_its_prefixes() -> None:
    fleet = chooser(idle("a"), idle("b"))
    turn = Footprint(25, 25, 640, 50, tuple(range(20)))
    fleet.sent("earlier", "b", turn, 0.0)
    fleet.retain({"a"})
    fleet.view.accept(idle("b"), 0.0)
    assert {s.cached_tokens for s in decided(fleet, "a", "b", footprint=turn).scores} == {0}


def test_a_request_without_hashes_finds_no_prefix() -> None:
    fleet = chooser(idle("a"))
    fleet.sent("earlier", "a", Footprint(25, 25, 640, 50, (1, 2)), 0.0)
    assert decided(fleet, "a").scores[0].cached_tokens == 0


def test_in_a_large_fleet_the_holder_of_the_prefix_is_among_the_ranked() -> None:
    ids = [f"r{index}" for index in range(1000)]
    fleet = chooser(*(idle(i) for i in ids))
    assert len(decided(fleet, *ids).scores) == 48
    history = tuple(range(50))
    fleet.sent("earlier", "r777", Footprint(60, 60, 1600, 50, history), 0.0)
    fleet.view.accept(idle("r777", sequence=2), 1.0)
    decision = decided(fleet, *ids, footprint=Footprint(60, 60, 1600, 50, history), now_s=1.0)
    assert decision.replica_ids[0] == "r777"


def test_a_fleet_of_any_size_remembers_a_million_blocks_at_most() -> None:
    ids = [f"r{index}" for index in range(1000)]
    fleet = Chooser(LocalView(), rng=random.Random(0), holds_sessions=True)
    for name in ids:
        fleet.view.accept(idle(name, blocks_total=25_000, blocks_free=25_000), 0.0)
    for index, name in enumerate(ids[:3]):
        hashes = tuple(range(5000 * index, 5000 * (index + 1)))
        fleet.sent(name, name, Footprint(60, 60, 160_000, 50, hashes), 0.0)
        assert fleet._affinity.cached_blocks(name, hashes[4000:]) == 1000
        assert fleet._affinity.cached_blocks(name, hashes) == 0


@pytest.mark.parametrize(("holds_sessions", "cached"), [(False, 0), (True, 150)])
def test_only_replicas_with_sessions_have_more_than_fits_into_their_blocks(
    holds_sessions: bool, cached: int
) -> None:
    fleet = Chooser(LocalView(), rng=random.Random(0), holds_sessions=holds_sessions)
    fleet.view.accept(idle("a", blocks_total=100, blocks_free=100), 0.0)
    first, second = tuple(range(150)), tuple(range(1000, 1100))
    for name, hashes in (("first", first), ("second", second)):
        fleet.sent(name, "a", Footprint(60, 60, 4800, 50, hashes), 0.0)
    (score,) = decided(fleet, "a", footprint=Footprint(60, 60, 4800, 50, first)).scores
    assert score.cached_tokens == 32 * cached


def test_a_session_leads_back_to_its_replica_where_no_prefix_is_known() -> None:
    ids = [f"r{index}" for index in range(100)]
    fleet = chooser(*(idle(i) for i in ids))
    # Its prompts' tokens are unknown, as those with images.
    turn = Footprint(25, 25, 800, 50, session=7)
    for name, session in (("r42", 7), ("r5", 8)):
        fleet.sent(name, name, turn._replace(session=session), 0.0)
        fleet.view.accept(idle(name, sequence=2), 1.0)
    longer = turn._replace(prompt_tokens=1000)
    decision = decided(fleet, *ids, footprint=longer, now_s=1.0)
    assert (decision.replica_ids[0], decision.reason) == ("r42", "session")
    assert decision.holder == "r42"
    assert decision.scores[0].cached_tokens == 800
    for other in (longer._replace(session=None), longer._replace(session=9)):
        assert decided(fleet, *ids, footprint=other, now_s=1.0).holder is None
    # A hint, no order.
    overloaded = idle("r42", prefill_tokens_queued=20_000, sequence=3)
    fleet.view.accept(overloaded, 2.0)
    assert decided(fleet, *ids, footprint=longer, now_s=2.0).replica_ids[0] != "r42"
    fleet.retain([name for name in ids if name != "r42"])
    assert decided(fleet, *ids, footprint=longer, now_s=3.0).reason == "least_cost"


def test_known_prefixes_outweigh_what_a_client_calls_its_session() -> None:
    fleet = chooser(idle("a"), idle("b"))
    prompt = Footprint(25, 25, 640, 50, tuple(range(20)))
    fleet.sent("cached", "a", prompt, 0.0)
    fleet.sent("named", "b", prompt._replace(block_hashes=(90, 91), session=7), 0.0)
    for name in "ab":
        fleet.view.accept(idle(name, sequence=2), 1.0)
    decision = decided(fleet, "a", "b", footprint=prompt._replace(session=7), now_s=1.0)
    assert (decision.replica_ids[0], decision.reason) == ("a", "affinity")


@given(
    free=st.lists(st.integers(0, 100), min_size=2, max_size=6),
    peak=st.integers(1, 120),
)
def test_more_room_never_costs_more(free: list[int], peak: int) -> None:
    ids = [f"r{index}" for index in range(len(free))]
    reports = [
        idle(i, blocks_total=100, blocks_free=f, running=1) for i, f in zip(ids, free, strict=True)
    ]
    decision = decided(chooser(*reports), *ids, footprint=Footprint(peak, peak, 100, 50))
    by_id = dict(zip(ids, free, strict=True))
    rooms = [by_id[i] for i in decision.replica_ids]
    fitting = [room >= peak for room in rooms]
    assert fitting == sorted(fitting, reverse=True)
