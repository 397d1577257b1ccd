"""The GPU's path where there is no GPU: in Triton's interpreter, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(torch.cuda.is_available(), reason="needs vLLM for CPUs"),
]


def run(*tests: str, **variables: str) -> None:
    plugin = "tests.adakv_worker.gpu.interpreted"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", plugin, *tests],
        env={**os.environ, "TRITON_INTERPRET": "1", **variables},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    print(done.stdout)
    assert done.returncode == 0


@pytest.mark.slow
@pytest.mark.long
def test_engines_answer_right_on_the_gpus_path() -> None:
    run(str(HERE / "gpu"), "-m", "not slow")


@pytest.mark.slow
@pytest.mark.long
def test_all_engines_answer_right_on_the_gpus_path() -> None:
    run(str(HERE / "gpu"), "-m", "slow")


@pytest.mark.slow
@pytest.mark.long
def test_a_request_moves_between_engines_on_model_runner_v2() -> None:
    run(
        f"{HERE / 'frontend' / 'test_moving.py'}::test_its_client_notices_nothing[seeded]",
        PYTHONPATH=f"{HERE / 'gpu' / 'startup'}:{ROOT}",
        VLLM_USE_V2_MODEL_RUNNER="1",
    )
