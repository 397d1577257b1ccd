"""The GPU's kernels where there is no GPU: in Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.heavy


@pytest.mark.skipif(torch.cuda.is_available(), reason="they run on the GPU itself")
def test_gpu_kernels_agree_with_their_references_in_the_interpreter() -> None:
    folder = Path(__file__).parent / "gpu"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(folder)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    print(done.stdout)
    assert done.returncode == 0
