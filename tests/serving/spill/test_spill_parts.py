"""Parts of the spill that need no engine."""

from pathlib import Path

import pytest

from serving.spill.borrower import MoveReport
from serving.spill.membership import on_membership, tell_membership
from serving.spill.parcels import StateFiles, remove_orphans


def test_only_what_dead_replicas_have_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / "adakv-spill-dead").mkdir()
    files = StateFiles(tmp_path)
    with files.path() as path:
        remove_orphans(tmp_path)
        assert list(tmp_path.iterdir()) == [path.parent]
    files.clear()
    assert not list(tmp_path.iterdir())


def test_a_replica_hears_of_itself_alone_and_only_of_changes() -> None:
    told: list[bool] = []
    on_membership("one", told.append)
    tell_membership([], ["other"])
    tell_membership(["other"], ["one", "other"])
    tell_membership(["one", "other"], ["one"])
    tell_membership(["one"], [])
    tell_membership([], ["one"])
    assert told == [True, False, True]


def test_waiting_for_a_steps_end_is_no_cost_of_a_move() -> None:
    report = MoveReport(
        "one",
        "lender",
        state_bytes=10_000_000,
        export_s=3.0,
        arrival_s=3.1,
        seconds=5,
        problem=None,
    )
    assert report.bytes_per_s == pytest.approx(1e8)
