"""The GPU's path where there is no GPU: in Triton's interpreter, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs vLLM for CPUs")
def test_engines_answer_right_on_the_gpus_path() -> None:
    folder = Path(__file__).parent / "gpu"
    plugin = "tests.adakv_worker.gpu.interpreted"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", plugin, str(folder)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    print(done.stdout)
    assert done.returncode == 0
