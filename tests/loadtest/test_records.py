"""Streams read line by line, and the figures of records."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adakv_serve.loadtest.client.records import Limits, Record, percentile, read_records, summary
from adakv_serve.loadtest.client.stream import StreamBroken, StreamedAnswer


def data(**event: object) -> str:
    return f"data: {json.dumps(event)}\n"


def test_a_stream_yields_times_and_counts() -> None:
    answer = StreamedAnswer(started_s=10.0)
    answer.take(data(choices=[{"delta": {"role": "assistant", "content": ""}}]), 10.5)
    for text, at_s in (("a", 11.0), ("b", 11.25), ("c", 12.0)):
        answer.take(data(choices=[{"delta": {"content": text}}]), at_s)
    assert not answer.finished
    usage = {
        "prompt_tokens": 9, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": 4},
    }  # fmt: skip
    answer.take(data(choices=[], usage=usage, kv_compression={"policy": "snapkv"}), 12.1)
    answer.take("data: [DONE]\n", 12.1)
    assert (answer.text, answer.ttft_s, answer.itl_s) == ("abc", 1.0, [0.25, 0.75])
    # Five tokens in three pieces: four of them after the first, within a second.
    assert answer.tpot_s == 0.25
    assert (answer.prompt_tokens, answer.cached_tokens, answer.output_tokens) == (9, 4, 5)
    assert answer.proof == {"policy": "snapkv"}
    assert answer.finished


def test_an_error_in_a_stream_breaks_it() -> None:
    with pytest.raises(StreamBroken, match="the replica died"):
        StreamedAnswer(0.0).take(data(error={"message": "the replica died"}), 1.0)


def test_a_summary_counts_successes_and_failures(tmp_path: Path) -> None:
    records = [
        Record("a", 0, at_s=1.0, ttft_s=0.5, tpot_s=0.1, e2e_s=2.0, output_tokens=16),
        Record("b", 0, at_s=2.0, ttft_s=3.0, tpot_s=0.1, e2e_s=4.0, output_tokens=24),
        Record("c", 0, at_s=3.0, e2e_s=0.1, error="HTTP 503: full"),
    ]
    path = tmp_path / "records.jsonl"
    path.write_text("".join(record.line() + "\n" for record in records))
    figures = summary(read_records(path), Limits(ttft_s=1.0))
    # From 1 s, when the first was sent, to 6 s, when the last ended.
    assert figures["elapsed_s"] == 5.0
    assert figures["tokens_per_s"] == 8.0
    assert figures["failures"] == {"HTTP 503: full": 1}
    assert (figures["ttft_p50_s"], figures["ttft_p95_s"]) == (0.5, 3.0)
    assert figures["goodput_requests_per_s"] == 0.2


@pytest.mark.parametrize(
    ("changes", "good"),
    [
        ({}, 1),
        ({"ttft_s": 1.5}, 0),
        ({"ttft_s": None}, 0),
        ({"tpot_s": 0.3}, 0),
        ({"error": "the stream was cut"}, 0),
    ],
)
def test_goodput_is_of_requests_that_succeed_within_every_limit(
    changes: dict[str, Any], good: int
) -> None:
    record = replace(Record("a", 0, at_s=0.0, ttft_s=1.0, tpot_s=0.2, e2e_s=2.0), **changes)
    figures = summary([record], Limits(ttft_s=1.0, tpot_s=0.2))
    assert (figures["good_share"], figures["goodput_requests_per_s"]) == (good, good / 2)


def test_without_records_there_are_no_percentiles() -> None:
    assert summary([])["ttft_p50_s"] is None


@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0.01, 1.0))
def test_a_percentile_is_not_exceeded_by_its_share(values: list[float], quantile: float) -> None:
    rounded = [round(value, 5) for value in values]
    found = percentile(rounded, quantile)
    assert found in rounded
    assert sum(value <= found for value in rounded) >= quantile * len(rounded) - 1e-6
