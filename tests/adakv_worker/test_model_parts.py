"""What is read of a loaded model."""

import pytest
import torch

from adakv_worker.model_parts import rotary_frequencies


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_frequencies_are_right_to_the_end_of_the_context(dtype: torch.dtype) -> None:
    frequencies = 500000.0 ** -(torch.arange(0, 128, 2, dtype=torch.float64) / 128)
    angles = torch.arange(8192)[:, None] * frequencies
    table = torch.cat((angles.cos(), angles.sin()), dim=1).to(dtype)
    found = rotary_frequencies(table)
    assert found.dtype == torch.float32
    # By so much a position is off at the end, in radians.
    assert float(((found - frequencies) * 8192).abs().max()) < 0.02
