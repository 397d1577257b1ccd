import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from adakv_serve.router import Occupancy, SchemaMismatch
from tests.router.occupancies import occupancy


@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_a_report_survives_the_wire(free: int, used: int) -> None:
    report = occupancy(blocks_total=free + used, blocks_free=free)
    assert Occupancy.parse(report.model_dump_json()) == report


def test_unknown_fields_of_a_newer_minor_version_are_ignored() -> None:
    payload = json.loads(occupancy().model_dump_json()) | {"schema_minor": 7, "new": [1]}
    assert Occupancy.parse(json.dumps(payload)).blocks_free == 40


def test_another_major_version_is_refused() -> None:
    payload = json.loads(occupancy().model_dump_json()) | {"schema_major": 2}
    with pytest.raises(SchemaMismatch, match="schema 2"):
        Occupancy.parse(json.dumps(payload))


@pytest.mark.parametrize(
    "change", [{"blocks_free": 101}, {"running": -1}, {"blocks_total": "many"}, {"epoch": None}]
)
def test_senseless_reports_are_refused(change: dict) -> None:
    payload = json.loads(occupancy().model_dump_json()) | change
    with pytest.raises(ValidationError):
        Occupancy.parse(json.dumps(payload))
