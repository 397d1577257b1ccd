"""These tests run on a CUDA GPU, or in Triton's interpreter where TRITON_INTERPRET=1 is set.

The interpreter must be chosen before anything imports Triton: `tests/kernels/test_gpu.py` starts a
process for it.
"""

import os

import pytest
import torch

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

collect_ignore_glob = [] if _INTERPRETED or torch.cuda.is_available() else ["test_*.py"]


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cpu" if _INTERPRETED else "cuda")
