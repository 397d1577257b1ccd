"""The local view: what reports, bookings and time do to the table of one router."""

from typing import Any, NamedTuple

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from adakv_serve.router.footprint import Footprint
from adakv_serve.router.local_view import LocalView, check_local_view
from adakv_serve.router.score import ReplicaView, Speeds
from tests.router.occupancies import idle, occupancy

BIG = Footprint(peak_blocks=30, steady_blocks=10, prompt_tokens=900, output_tokens=50)


def view_of(view: LocalView, now_s: float, replica_id: str = "r1") -> ReplicaView:
    (seen,) = view.views([replica_id], now_s)
    return seen


def test_a_report_gives_the_room_that_is_left() -> None:
    view = LocalView()
    view.accept(
        occupancy(
            blocks_free=70, blocks_reserved_growth=20, waiting_blocks=10,
            running=3, waiting=2, prefill_tokens_queued=400,
        ),
        0.0,
    )  # fmt: skip
    assert view_of(view, 0.0) == ReplicaView(
        "r1", blocks_total=100, room_blocks=40, used_blocks=30, running=3, waiting=2,
        prefill_tokens=400,
    )  # fmt: skip


def test_a_booking_takes_room_a_place_in_the_queue_and_prefill() -> None:
    view = LocalView()
    view.accept(idle("r1"), 0.0)
    before = view_of(view, 0.0)
    view.book("one", "r1", BIG, 0.0)
    assert view_of(view, 0.0) == before._replace(room_blocks=70, waiting=1, prefill_tokens=900)
    view.book("two", "r1", BIG, 0.0)
    assert view_of(view, 0.0) == before._replace(room_blocks=40, waiting=2, prefill_tokens=1800)
    view.unbook("one")
    view.unbook("two")
    assert view_of(view, 0.0) == before


def test_cached_and_computed_tokens_are_no_prefill() -> None:
    view = LocalView()
    view.accept(idle("r1"), 0.0)
    view.book("one", "r1", BIG, 0.0, cached_tokens=800)
    assert view_of(view, 0.0).prefill_tokens == 100
    view.answered("one")
    # It still holds its blocks.
    seen = view_of(view, 0.0)
    assert (seen.prefill_tokens, seen.room_blocks, seen.waiting) == (0, 70, 1)
    view.answered("unknown")
    check_local_view(view)


def test_a_request_is_booked_at_the_last_place_alone() -> None:
    view = LocalView()
    view.accept(idle("r1"), 0.0)
    view.accept(idle("r2"), 0.0)
    view.book("one", "r1", BIG, 0.0)
    view.book("one", "r2", BIG, 0.1)
    assert view_of(view, 0.1, "r1").room_blocks == 100
    assert view_of(view, 0.1, "r2").room_blocks == 70


@pytest.mark.parametrize(("reported_s", "room"), [(0.2, 70), (0.25, 100), (0.3, 100)])
def test_a_booking_ends_with_a_report_made_after_the_request_arrived(
    reported_s: float, room: int
) -> None:
    view = LocalView()
    view.accept(idle("r1"), 0.0)
    view.book("one", "r1", BIG, 0.0)
    view.accept(idle("r1", sequence=2), reported_s)
    assert view_of(view, reported_s).room_blocks == room


@pytest.mark.parametrize(("now_s", "room"), [(1.99, 70), (2.0, 100), (5.0, 100)])
def test_a_booking_ends_by_itself(now_s: float, room: int) -> None:
    view = LocalView(ttl_s=60)
    view.accept(idle("r1"), 0.0)
    view.book("one", "r1", BIG, 0.0)
    assert view_of(view, now_s).room_blocks == room
    assert view_of(view, 1.0).room_blocks == 70, "a look at the view ended a booking"


def test_bookings_on_a_silent_replica_do_not_pile_up() -> None:
    view = LocalView()
    view.accept(idle("r1"), 0.0)
    for second in range(10):
        view.book(f"request-{second}", "r1", BIG, float(second))
        check_local_view(view)


def test_a_report_counts_for_its_time_to_live() -> None:
    view = LocalView(ttl_s=2)
    view.accept(idle("r1"), 1.0)
    assert view.views(["r1"], 3.0)
    assert not view.views(["r1"], 3.01)


def test_silent_and_unknown_replicas_are_left_out() -> None:
    view = LocalView(ttl_s=2)
    view.accept(idle("silent"), 0.0)
    view.accept(idle("r1"), 3.0)
    seen = view.views(["unknown", "silent", "r1"], 3.0)
    assert [each.replica_id for each in seen] == ["r1"]


def test_malformed_reports_and_those_of_another_major_version_are_dropped_and_counted() -> None:
    view = LocalView()
    other = occupancy().model_copy(update={"schema_major": 2}).model_dump_json()
    payloads = [b"", b"{", other, b"[]", b'{"schema_major": 1}', b"\xff", other]
    for dropped, payload in enumerate(payloads, 1):
        view.receive(payload, 0.0)
        assert view.dropped == dropped
    assert (view.replica_ids, view.quarantined) == ([], 0)


@pytest.mark.parametrize(
    "payload",
    [
        # Fields are missing, or the replica is.
        b'{"schema_major": 1, "replica_id": "r1"}',
        b'{"schema_major": 1, "running": -1}',
    ],
)
def test_only_a_contradiction_of_a_known_replica_means_quarantine(payload: bytes) -> None:
    view = LocalView()
    view.accept(occupancy("r1"), 0.0)
    view.receive(payload, 0.0)
    assert (view.dropped, view.quarantined) == (1, 0)
    assert view.views(["r1"], 0.0)


def test_every_quarantine_counts_once_until_it_ends() -> None:
    view = LocalView()
    wrong = occupancy("r1").model_copy(update={"running": -1}).model_dump_json()
    for now_s, quarantined in ((0.0, 1), (29.0, 1), (58.0, 1), (88.0, 2)):
        view.receive(wrong, now_s)
        assert view.quarantined == quarantined


def test_replicas_that_fell_silent_are_forgotten() -> None:
    view = LocalView()
    for life in range(100):
        view.accept(idle(f"life-{life}"), float(life))
        view.accept(idle("r1", sequence=life + 1), float(life))
    assert view.replica_ids == [f"life-{life}" for life in range(39, 100)] + ["r1"]
    assert view.blocks_total("life-0") == 0
    assert view.blocks_total("r1") == 100


def test_a_view_without_an_end_of_reports_forgets_no_replica() -> None:
    view = LocalView(ttl_s=1e12)
    view.accept(idle("r1"), 0.0)
    view.accept(idle("r2"), 1e6)
    assert view.replica_ids == ["r1", "r2"]


class Booked(NamedTuple):
    replica_id: str
    at_s: float
    footprint: Footprint


class LocalViewMachine(RuleBasedStateMachine):
    """A view beside a model that keeps everything and looks through all of it."""

    def __init__(self) -> None:
        super().__init__()
        self.view = LocalView()
        self.now_s = 0.0
        self.sequence = 0
        self.reported_s: dict[str, float] = {}
        self.booked: dict[int, Booked] = {}

    @rule(seconds=st.sampled_from([0.0, 0.1, 0.25, 1.0, 2.0, 61.0]))
    def wait(self, seconds: float) -> None:
        self.now_s += seconds

    @rule(replica=st.sampled_from("abc"))
    def report(self, replica: str) -> None:
        self.sequence += 1
        self.view.accept(idle(replica, sequence=self.sequence), self.now_s)
        self.reported_s[replica] = self.now_s
        silent = {r for r, at_s in self.reported_s.items() if at_s < self.now_s - 60}
        for each in silent:
            self.withdraw_from_model(each)

    @rule(replica=st.sampled_from("abc"))
    def withdraw(self, replica: str) -> None:
        self.view.withdraw(replica)
        self.withdraw_from_model(replica)

    def withdraw_from_model(self, replica: str) -> None:
        self.reported_s.pop(replica, None)
        self.booked = {r: b for r, b in self.booked.items() if b.replica_id != replica}

    @rule(
        request=st.integers(0, 5),
        replica=st.sampled_from("abc"),
        peak=st.integers(1, 50),
        prompt=st.integers(1, 2000),
    )
    def book(self, request: int, replica: str, peak: int, prompt: int) -> None:
        footprint = Footprint(peak, peak, prompt, 1)
        self.view.book(request, replica, footprint, self.now_s)
        self.booked.pop(request, None)
        if replica in self.reported_s:
            self.booked[request] = Booked(replica, self.now_s, footprint)

    @rule(request=st.integers(0, 5))
    def unbook(self, request: int) -> None:
        self.view.unbook(request)
        self.booked.pop(request, None)

    @invariant()
    def agrees_with_the_model(self) -> None:
        for seen in self.view.views("abc", self.now_s):
            reported_s = self.reported_s[seen.replica_id]
            counted = [
                booked.footprint
                for booked in self.booked.values()
                if booked.replica_id == seen.replica_id
                and booked.at_s > max(self.now_s - 2.0, reported_s - 0.25)
            ]
            assert seen.room_blocks == 100 - sum(each.peak_blocks for each in counted)
            assert seen.waiting == len(counted)
            assert seen.prefill_tokens == sum(each.prompt_tokens for each in counted)
        fresh = {r for r, at_s in self.reported_s.items() if self.now_s - at_s <= 2.0}
        assert {seen.replica_id for seen in self.view.views("abc", self.now_s)} == fresh
        assert self.view.silent("abc", self.now_s) == 3 - len(fresh)
        check_local_view(self.view)


TestLocalView = LocalViewMachine.TestCase


@pytest.mark.parametrize("change", [{"blocks_free": 101}, {"blocks_free": -1}, {"running": -3}])
def test_a_replica_that_contradicts_itself_is_quarantined_for_a_while(
    change: dict[str, int], caplog: pytest.LogCaptureFixture
) -> None:
    view = LocalView()
    view.receive(occupancy("r1", sequence=5).model_dump_json(), 0.0)
    assert view.replica_ids == ["r1"]
    for sequence in (6, 7):
        wrong = occupancy("r1", sequence=sequence).model_copy(update=change)
        view.receive(wrong.model_dump_json(), 1.0)
    assert view.quarantined == 1
    assert len(caplog.records) == 1
    view.receive(occupancy("r1", sequence=8).model_dump_json(), 2.0)
    assert view.views(["r1"], 2.0) == []
    view.receive(occupancy("r1", sequence=9).model_dump_json(), 60.0)
    assert len(view.views(["r1"], 60.0)) == 1


def test_the_step_that_runs_is_taken_to_make_progress() -> None:
    view = LocalView(ttl_s=60, speeds=Speeds(prefill_tokens_per_s=500))

    def left(now_s: float, **report: Any) -> int:
        if report:
            view.accept(idle("r1", **report), now_s)
        return view.views(["r1"], now_s)[0].prefill_tokens

    assert left(0.0, sequence=1, prefill_tokens_queued=1600) == 1600
    assert left(0.5) == 1350
    # No report of its end yet.
    assert left(9.0) == 1200
    # New prompts wait for the step's end.
    assert left(9.0, sequence=2, prefill_tokens_queued=9600) == 9600 - 2048
    assert left(30.0) == 9600 - 2048
    assert left(30.0, sequence=3, prefill_tokens_queued=8000) == 8000
    # Prompts that wait for memory may not be running at all.
    assert left(31.0, sequence=4, prefill_tokens_queued=8000, waiting_blocks=200) == 8000


def test_an_older_report_changes_nothing() -> None:
    view = LocalView()
    view.accept(occupancy(sequence=2, running=5), 0.0)
    view.accept(occupancy(sequence=1, running=9), 0.1)
    assert view.views(["r1"], 0.1)[0].running == 5
    # A replica that was started anew counts from one again.
    view.accept(occupancy(epoch=2, sequence=1, running=0), 0.2)
    assert view.views(["r1"], 0.2)[0].running == 0


def test_the_last_reports_have_their_ages() -> None:
    view = LocalView(ttl_s=2)
    view.accept(occupancy("r1", sequence=1), 0.0)
    view.accept(occupancy("r2", blocks_lent=5), 1.0)
    view.accept(occupancy("r1", sequence=2, running=7), 4.0)
    reports = {report.replica_id: (report, age_s) for report, age_s in view.last_reports(5.0)}
    assert {name: age_s for name, (_, age_s) in reports.items()} == {"r1": 1.0, "r2": 4.0}
    assert (reports["r1"][0].running, reports["r2"][0].blocks_lent) == (7, 5)
    view.withdraw("r2")
    assert [report.replica_id for report, _ in view.last_reports(5.0)] == ["r1"]
