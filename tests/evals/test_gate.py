"""Every preset answers as well as when its figures were recorded."""

from dataclasses import replace

import pytest

from adakv_serve.evals.answering.engine import ForcedEngine
from adakv_serve.evals.choice import FULL
from adakv_serve.evals.gate import PLAN, RECORDED, moved
from adakv_serve.evals.results.files import finished, read_rows
from adakv_serve.evals.run import run
from adakv_serve.serving.models.embedded import EMBEDDED_MODEL_NAME


def test_the_usual_preset_answers_as_was_recorded(embedded_engine: ForcedEngine) -> None:
    plan = PLAN._replace(policies=("ada_snapkv",))
    rows = finished(run(embedded_engine, EMBEDDED_MODEL_NAME, plan))
    recorded = [row for row in read_rows(RECORDED) if row.policy in (FULL, *plan.policies)]
    assert moved(recorded, rows) == []


@pytest.mark.slow
@pytest.mark.long
def test_no_preset_answers_otherwise_than_was_recorded(embedded_engine: ForcedEngine) -> None:
    rows = finished(run(embedded_engine, EMBEDDED_MODEL_NAME, PLAN))
    assert moved(read_rows(RECORDED), rows) == []


def test_a_preset_that_got_worse_is_told() -> None:
    rows = read_rows(RECORDED)
    worse = [
        replace(row, agreement=row.agreement - 0.1)
        if row.policy == "kv_compress" and row.agreement is not None
        else row
        for row in rows
    ]
    lines = moved(rows, worse)
    assert [line.split(" was")[0] for line in lines] == [
        "agnostic kv_compress 96: agreement",
        "aware kv_compress 96: agreement",
    ]
    assert moved(rows, rows[1:]) == ["aware full all: not the same tasks"]
