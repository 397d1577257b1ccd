"""Parts read from a loaded model."""

import pytest
import torch
from torch import Tensor

from adakv_worker.worker.model_parts import rotary_frequencies

FREQUENCIES = 500000.0 ** -(torch.arange(0, 128, 2, dtype=torch.float64) / 128)


def table(frequencies: Tensor) -> Tensor:
    angles = torch.arange(8192)[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_frequencies_are_right_to_the_end_of_the_context(dtype: torch.dtype) -> None:
    found = rotary_frequencies(table(FREQUENCIES).to(dtype))
    assert found.dtype == torch.float32
    # By so much a position is off at the end, in radians.
    assert float(((found - FREQUENCIES) * 8192).abs().max()) < 0.02


def test_of_several_scalings_the_first_is_read() -> None:
    found = rotary_frequencies(torch.cat((table(FREQUENCIES), table(FREQUENCIES / 4))))
    assert float(((found - FREQUENCIES) * 8192).abs().max()) < 0.02
