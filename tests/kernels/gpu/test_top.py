"""Radix select against the stable sort: the same entries, also where scores tie."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adakv_serve.kernels.gpu.top import radix_top_mask
from adakv_serve.kernels.policies.top import top_mask


def check(scores: Tensor, counts: list[int]) -> None:
    expected = top_mask.reference(scores.cpu(), torch.tensor(counts))
    mask = radix_top_mask(scores, torch.tensor(counts, device=scores.device))
    assert torch.equal(mask.cpu(), expected)


@pytest.mark.parametrize("m", [1, 2, 31, 1000, 1024, 1025, 5000])
def test_random_scores(m: int, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(m)
    scores = torch.randn((4, m), generator=generator).to(device)
    check(scores, [0, 1, m // 2, m])


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_random_shapes_and_ties(data: st.DataObject, device: torch.device) -> None:
    m = data.draw(st.integers(1, 1 << 17 if device.type == "cuda" else 3000))
    rows, values = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4000))
    generator = torch.Generator().manual_seed(m)
    scores = torch.randint(-values, values, (rows, m), generator=generator) / 7
    check(scores.to(device), data.draw(st.lists(st.integers(0, m), min_size=rows, max_size=rows)))


@pytest.mark.parametrize("values", [1, 2, 5])
@pytest.mark.parametrize("m", [7, 1500])
def test_ties_go_to_the_earlier(values: int, m: int, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(m + values)
    scores = torch.randint(-values, values, (3, m), generator=generator).float().to(device)
    check(scores, [1, m // 3, m - 1])


def test_numbers_of_every_kind(device: torch.device) -> None:
    kinds = [0.0, -0.0, 1e-45, -1e-45, 1e-38, 3e38, -3e38, 1e30, float("inf"), float("-inf"), 1.0]
    scores = torch.tensor([kinds * 3, (kinds * 3)[::-1]], device=device)
    for count in range(scores.shape[1] + 1):
        check(scores, [count, scores.shape[1] - count])


def test_masked_scores_are_not_taken(device: torch.device) -> None:
    """Ada-KV masks secured entries out of its second selection."""
    scores = torch.rand((1, 300), generator=torch.Generator().manual_seed(0)).to(device)
    first = radix_top_mask(scores, torch.tensor([40], device=device))
    second = radix_top_mask(
        scores.masked_fill(first, float("-inf")), torch.tensor([60], device=device)
    )
    assert not (first & second).any()
    check(scores, [100])
    assert torch.equal(first | second, radix_top_mask(scores, torch.tensor([100], device=device)))


def test_rows_in_more_dimensions(device: torch.device) -> None:
    scores = torch.rand((2, 3, 50), generator=torch.Generator().manual_seed(0)).to(device)
    counts = torch.tensor([[1, 2, 3], [0, 50, 7]], device=device)
    mask = radix_top_mask(scores, counts)
    assert torch.equal(mask.sum(dim=-1), counts)
    assert radix_top_mask(scores[..., :0], counts * 0).shape == (2, 3, 0)


def test_long_rows(device: torch.device) -> None:
    m = 128 * 1024 if device.type == "cuda" else 20_000
    scores = torch.randint(0, 500, (1, m), generator=torch.Generator().manual_seed(1)).float()
    check(scores.to(device), [m // 4])
