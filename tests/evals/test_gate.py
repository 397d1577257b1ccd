"""Every preset answers as well as when its figures were recorded."""

import random
from collections.abc import Iterator
from dataclasses import replace

import pytest

from evals.choice import Choice
from evals.engine import ForcedEngine
from evals.gate import PLAN, RECORDED, moved
from evals.generation import run_generation
from evals.run import read_rows, run
from evals.tasks.source import Source
from serving.embedded_model import EMBEDDED_MODEL_NAME, embedded_model_path


@pytest.fixture(scope="module")
def engine(in_process: None) -> Iterator[ForcedEngine]:
    engine = ForcedEngine(embedded_model_path(), 2048, 512 << 20)
    yield engine
    engine.close()


def test_no_preset_answers_otherwise_than_was_recorded(engine: ForcedEngine) -> None:
    parts = run(engine, EMBEDDED_MODEL_NAME, PLAN)
    assert moved(read_rows(RECORDED), [row for part in parts for row in part]) == []


def test_long_answers_are_held_against_the_whole_caches_own(engine: ForcedEngine) -> None:
    choices = [Choice("ada_snapkv", tokens=64, decode_tokens=tokens) for tokens in (64, 1500)]
    source = Source(engine.tokenizer, 2048, random.Random(1))
    full, little, ample = run_generation(engine, "model", source, choices, 2, 300)
    assert (full.n, full.agreement, full.kl) == (2, 1.0, 0.0)
    assert (little.kept, ample.kept) == ("64 while decoding", "1500 while decoding")
    assert little.kl is not None
    assert ample.kl is not None
    assert 0.0 < ample.kl < little.kl


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
