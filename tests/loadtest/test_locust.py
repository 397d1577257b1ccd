"""Locust with our file, as a user would run it from any folder, against a small server."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from adakv_serve.loadtest.client.records import Record, read_records
from tests.loadtest.fake_openai import FakeOpenAI, serving

FOLDER = Path(__file__).parents[2] / "loadtest"
TOKENS = 5


class Run(NamedTuple):
    """What a run left: its exit status, summary, records, and Locust's own rows by type."""

    status: int
    errors: str
    summary: dict[str, Any]
    records: list[Record]
    rows: dict[str, dict[str, Any]]

    def mean_s(self, kind: str) -> float:
        row = self.rows[kind]
        return row["total_response_time"] / row["num_requests"] / 1000


def locust(folder: Path, files: list[Path], *options: str) -> Run:
    records, stats = folder / "records.jsonl", folder / "stats"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [
            sys.executable, "-m", "locust", "-f", ",".join(map(str, files)), "--headless",
            "-r", "100", "--records", str(records), "--json-file", str(stats), *options,
        ],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    table = Path(f"{stats}.json")
    rows = json.loads(table.read_text()) if table.exists() else []
    return Run(
        done.returncode,
        done.stderr,
        json.loads(lines[-1]) if lines else {},
        read_records(records) if records.exists() else [],
        {row["method"]: row for row in rows},
    )


@pytest.fixture(scope="module")
def slow_server() -> Iterator[FakeOpenAI]:
    """Fails the last of four requests."""
    fake = FakeOpenAI(before_headers_s=0.3, between_texts_s=0.2, failing=frozenset({3}))
    with serving(fake):
        yield fake


@pytest.fixture(scope="module")
def run(slow_server: FakeOpenAI, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("elsewhere")
    return locust(
        folder, [FOLDER / "locustfile.py"], "--host", f"{slow_server.url}/small/", "-u", "2",
        "--warmup", "1",
        "--requests", "3", "--prompt-tokens", "50", "--output-tokens", str(TOKENS),
        "--limit-ttft-s", "100",
    )  # fmt: skip


def test_it_runs_from_any_folder_and_leaves_out_the_warm_up(
    run: Run, slow_server: FakeOpenAI
) -> None:
    # Locust's own status of a run with a failure.
    assert run.status == 1, run.errors
    assert (len(slow_server.served), len(run.records)) == (4, 3)
    assert {served.body["max_tokens"] for served in slow_server.served} == {TOKENS}


def test_the_hosts_path_is_before_the_apis(run: Run, slow_server: FakeOpenAI) -> None:
    assert slow_server.paths == {"/small/v1/models", "/small/v1/chat/completions"}


def test_a_failed_request_counts_as_one_and_not_for_goodput(run: Run) -> None:
    assert run.summary["requests"] == 3
    assert run.summary["failures"] == {"HTTP 503: full": 1}
    assert run.summary["good_share"] == pytest.approx(2 / 3, abs=1e-3)
    assert run.rows["E2E"]["num_failures"] == 1
    assert [run.rows[kind]["num_requests"] for kind in ("E2E", "TTFT", "ITL")] == [3, 2, 4]


def test_locusts_clock_starts_before_the_request_and_follows_the_texts(
    run: Run, slow_server: FakeOpenAI
) -> None:
    answered = slow_server.served[1:3]
    ttft_s, tpot_s, itl_s = map(run.mean_s, ("TTFT", "TPOT", "ITL"))
    # A client can never see a text sooner than it was sent.
    assert ttft_s >= sum(one.texts_s[0] - one.came_s for one in answered) / 2 - 1e-5
    assert ttft_s + 2 * itl_s >= sum(one.texts_s[-1] - one.came_s for one in answered) / 2 - 1e-4
    # Three texts of all tokens: two gaps, and all tokens but one in them.
    assert tpot_s * (TOKENS - 1) == pytest.approx(2 * itl_s, abs=1e-4)


def test_locusts_events_are_the_times_of_the_records(run: Run) -> None:
    done = [record for record in run.records if record.error is None]
    expected = {
        "E2E": [record.e2e_s for record in run.records],
        "TTFT": [record.ttft_s for record in done],
        "TPOT": [record.tpot_s for record in done],
        "ITL": [gap for record in done for gap in record.itl_s],
    }
    for kind, values in expected.items():
        seconds = [value for value in values if value is not None]
        assert run.mean_s(kind) == pytest.approx(sum(seconds) / len(seconds))
    for record in done:
        assert record.ttft_s is not None
        assert record.e2e_s >= record.ttft_s + sum(record.itl_s) - 1e-4
    assert run.rows["E2E"]["total_content_length"] == 2 * TOKENS


@pytest.mark.slow
def test_a_shape_decides_how_many_users_ask(tmp_path: Path) -> None:
    with serving(FakeOpenAI(between_texts_s=0.1)) as fake:
        run = locust(
            tmp_path, [FOLDER / "locustfile.py", FOLDER / "shapes" / "ramp.py"],
            "--host", fake.url, "--prompt-tokens", "50", "--output-tokens", str(TOKENS),
            "--ramp", "1:5:4",
        )  # fmt: skip
    assert run.status == 0, run.errors
    users = list(map(int, re.findall(r"Shape test updating to (\d) users", run.errors)))
    # Locust asks once a second.
    assert len(users) >= 2
    assert users == sorted(set(users))
    assert "Shape test completed" in run.errors
    assert run.records


@pytest.mark.slow
def test_a_shape_that_cannot_be_ends_the_run_with_a_reason(tmp_path: Path) -> None:
    with serving(FakeOpenAI()) as fake:
        run = locust(
            tmp_path, [FOLDER / "locustfile.py", FOLDER / "shapes" / "steps.py"],
            "--host", fake.url, "--steps", "0:9",
        )  # fmt: skip
    assert run.status == 2
    assert "loadtest: --steps: users and seconds must be positive" in run.errors
