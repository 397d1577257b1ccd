"""The fleet over time: who is there, who is gone, what has happened."""

from typing import Any

import pytest

from adakv_serve.router.ledger.occupancy import REPORT_TTL_S, Report
from adakv_serve.serving.http.page.figures import FRESH, GONE, SILENT
from adakv_serve.serving.http.page.fleet import Changes, Fleet
from tests.router.occupancies import occupancy


def reports(*replica_ids: str, age_s: float = 0.1, **changes: Any) -> list[Report]:
    return [Report(occupancy(name, **changes), age_s) for name in replica_ids]


def states(fleet: Fleet) -> dict[str, int]:
    return {row.id: row.state for row in fleet.figures()}


def kinds(fleet: Fleet) -> list[tuple[str, str, int]]:
    return [(event.kind, event.replica_id, event.amount) for event in fleet.events()]


def test_a_replica_shows_its_blocks() -> None:
    fleet = Fleet()
    held = {"blocks_compressed": 30, "blocks_uncompressed": 30, "blocks_reserved_growth": 9}
    more = {"blocks_held": 8, "blocks_lent": 7, "blocks_borrowed": 6, "sessions_held": 2}
    fleet.update(reports("r1", **held, **more, achieved_compression=0.5, preemptions=4), 0, 0)
    (row,) = fleet.figures()
    assert (row.total, row.free, row.compressed, row.whole, row.growth) == (100, 40, 30, 30, 9)
    assert (row.held, row.lent, row.borrowed, row.sessions) == (8, 7, 6, 2)
    assert (row.running, row.waiting, row.kept, row.preemptions) == (2, 1, 0.5, 4)


def test_who_is_there_at_first_has_not_joined() -> None:
    fleet = Fleet()
    fleet.update(reports("r1"), 0, 0)
    assert kinds(fleet) == []
    fleet.update(reports("r1", "r2"), 1, 1)
    assert kinds(fleet) == [("joined", "r2", 0)]


def test_a_replica_without_reports_is_silent_and_comes_back() -> None:
    fleet = Fleet()
    for age_s in (0.1, REPORT_TTL_S + 0.1, 0.1):
        fleet.update(reports("r1", age_s=age_s), 0, 0)
    assert kinds(fleet) == [("silent", "r1", 0), ("back", "r1", 0)]
    assert states(fleet) == {"r1": FRESH}
    fleet.update(reports("r1", age_s=REPORT_TTL_S + 0.1), 0, 0)
    assert states(fleet) == {"r1": SILENT}


def test_a_replica_that_is_gone_is_shown_for_a_minute() -> None:
    fleet = Fleet()
    fleet.update(reports("r1", "r2"), 0, 0)
    # A router may forget one for a moment.
    fleet.update(reports("r2"), 2, 2)
    assert states(fleet)["r1"] == FRESH
    fleet.update(reports("r2"), 4, 4)
    assert states(fleet) == {"r1": GONE, "r2": FRESH}
    assert kinds(fleet) == [("gone", "r1", 0)]
    fleet.update(reports("r2"), 60, 60)
    assert "r1" in states(fleet)
    fleet.update(reports("r2"), 65, 65)
    assert "r1" not in states(fleet)


@pytest.mark.parametrize(
    ("before", "after", "event"),
    [
        ({"preemptions": 2}, {"preemptions": 5}, ("preempted", "r1", 3)),
        ({"moves": 1}, {"moves": 2}, ("moved", "r1", 1)),
        ({}, {"failed_moves": 1}, ("returned", "r1", 1)),
        ({}, {"blocks_lent": 12}, ("lends", "r1", 12)),
        ({}, {"epoch": 2}, ("restarted", "r1", 0)),
    ],
)
def test_a_report_tells_what_has_happened(
    before: dict[str, Any], after: dict[str, Any], event: tuple[str, str, int]
) -> None:
    fleet = Fleet()
    fleet.update(reports("r1", **before), 0, 0)
    fleet.update(reports("r1", **after), 1, 1)
    fleet.update(reports("r1", **after), 2, 2)
    assert kinds(fleet) == [event]


def test_counts_start_again_in_a_new_life() -> None:
    fleet = Fleet()
    assert fleet.update(reports("r1", preemptions=9, moves=5), 0, 0) == Changes(0, 0)
    assert fleet.update(reports("r1", preemptions=11, moves=6), 1, 1) == Changes(2, 1)
    again = reports("r1", preemptions=1, moves=2, epoch=2)
    assert fleet.update(again, 2, 2) == Changes(1, 2)


def test_events_are_numbered_and_few() -> None:
    fleet = Fleet()
    for count in range(200):
        fleet.update(reports("r1", preemptions=count), count, count)
    events = fleet.events()
    assert [event.number for event in events] == list(range(170, 200))
    assert fleet.events(after=198) == events[-1:]
