"""`python -m serving.run` where it cannot start."""

import subprocess
import sys
from pathlib import Path

import pytest

from adakv_serve.loadtest.servers.ports import free_port


def run(*words: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "adakv_serve.serving.run", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_an_address_without_a_cluster_is_named_in_one_line() -> None:
    done = run("configs/cluster.yaml", "--address", f"127.0.0.1:{free_port()}")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("configs/cluster.yaml: no Ray cluster answers")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "No such file or directory"),
        ("applications: [", "no YAML: while parsing a flow node"),
        ("", "no configuration of `serve run`"),
    ],
)
def test_a_file_that_is_no_configuration_is_named_in_one_line(
    tmp_path: Path, text: str | None, said: str
) -> None:
    path = tmp_path / "mine.yaml"
    if text is not None:
        path.write_text(text)
    done = run(str(path))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"{path}: {said}")
    assert "Traceback" not in done.stderr
