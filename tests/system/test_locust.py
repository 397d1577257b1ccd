"""Locust, as a user would run it, against the running deployment."""

import json
import os
import subprocess
import sys
from pathlib import Path

from adakv_serve.loadtest.client.records import read_records
from adakv_serve.loadtest.servers.ports import free_port
from tests.system.deployment import API_KEY, ROOT, Deployment

LOCUST = [sys.executable, "-m", "locust", "-f", "loadtest/locustfile.py"]
ENVIRONMENT = {**os.environ, "OPENAI_API_KEY": API_KEY}


def locust(deployment: Deployment, *options: str) -> subprocess.CompletedProcess[str]:
    command = [*LOCUST, "--headless", "-r", "100", "--host", deployment.base_url, *options]
    return subprocess.run(
        command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )


def test_long_documents_are_compressed_and_none_fails(
    deployment: Deployment, tmp_path: Path
) -> None:
    path = tmp_path / "records.jsonl"
    done = locust(
        deployment, "-u", "3", "--workload", "long-document-qa", "--prompt-tokens", "700",
        "--output-tokens", "12", "--warmup", "1", "--requests", "6", "--records", str(path),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    records = read_records(path)
    assert len(records) == 6
    for record in records:
        assert record.error is None
        assert record.output_tokens == 12
        assert record.prompt_tokens > 600
        assert record.ttft_s is not None
        assert record.replica
        assert record.kv_compression is not None
        assert record.kv_compression["skipped"] is None
        assert record.kv_compression["blocks_after"] < record.kv_compression["blocks_before"]
    figures = json.loads(done.stdout.splitlines()[-1])
    assert (figures["requests"], figures["compressed"], figures["failures"]) == (6, 6, {})
    assert figures["output_tokens"] == 72


def test_conversations_carry_on_and_find_their_prefix(
    deployment: Deployment, tmp_path: Path
) -> None:
    path = tmp_path / "records.jsonl"
    done = locust(
        deployment, "-u", "2", "--workload", "chat", "--prompt-tokens", "900",
        "--output-tokens", "16", "--requests", "6", "--rate", "5", "--records", str(path),
        "--xargs", '{"adakv_policy": "full"}',
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    later = [record for record in read_records(path) if record.turn > 0]
    assert later
    # A session's turns go where its prefix is.
    assert all(record.cached_tokens > 300 for record in later)


def test_what_the_server_does_not_have_ends_the_test_with_a_reason(deployment: Deployment) -> None:
    done = locust(deployment, "--model", "another")
    assert done.returncode == 2
    assert "the server has no model 'another': it has smollm2-135m-instruct" in done.stderr


def test_workers_share_the_load(deployment: Deployment, tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    port = str(free_port())
    workers = [
        subprocess.Popen([*LOCUST, "--worker", "--master-port", port], cwd=ROOT, env=ENVIRONMENT)
        for _ in range(2)
    ]
    try:
        done = locust(
            deployment, "--master", "--master-bind-port", port, "--expect-workers", "2", "-u", "2",
            "--prompt-tokens", "300", "--output-tokens", "4", "--requests", "3",
            "--records", str(path),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        assert [worker.wait(timeout=60) for worker in workers] == [0, 0]
    finally:
        for worker in workers:
            worker.kill()
    shares = [read_records(path), read_records(tmp_path / "records.jsonl.1")]
    assert [len(share) for share in shares] == [2, 1]
    assert {record.error for share in shares for record in share} == {None}
