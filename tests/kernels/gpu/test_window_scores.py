"""Window scores from pages against attention in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adakv_serve.kernels.gpu.window_scores import _reduced, window_scores
from adakv_serve.kernels.paging.entries import PagedEntries
from adakv_serve.kernels.policies.attention import Reduction
from tests.kernels.paging import WITH_SCALES, in_bytes, with_scales

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def expected(queries: Tensor, keys: Tensor, scale: float, reduction: Reduction) -> Tensor:
    """Return scores [H, n - w] of queries [H, G, w, D] over keys [H, n, D]."""
    window, n = queries.shape[2], keys.shape[1]
    logits = torch.einsum("hgwd,hnd->hgwn", queries.double(), keys.double()) * scale
    future = torch.ones((window, n), dtype=torch.bool, device=keys.device).triu(n - window + 1)
    attention = logits.masked_fill(future, float("-inf")).softmax(dim=-1)[..., : n - window]
    if reduction == "mean":
        return attention.mean(dim=(1, 2))
    if reduction == "max":
        return attention.mean(dim=2).amax(dim=1)
    return attention.square().sum(dim=(1, 2))


def relative_error(got: Tensor, wanted: Tensor) -> float:
    assert not got.isnan().any()
    return float((got.double() - wanted).norm() / wanted.norm().clamp(min=1e-30))


def paged(keys: Tensor, page_tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    """Put keys [H, n, D] into a pool of shuffled pages; return pool and pages [nb, H]."""
    heads, n, dim = keys.shape
    blocks = -(-n // page_tokens)
    generator = torch.Generator().manual_seed(seed)
    memory = torch.full(
        (2 * blocks * heads, page_tokens, 2 * dim), torch.nan, dtype=keys.dtype, device=keys.device
    )
    pool = memory[..., :dim]
    pages = torch.randperm(2 * blocks * heads, generator=generator)[: blocks * heads]
    pages = pages.view(blocks, heads).to(keys.device)
    position = torch.arange(n, device=keys.device)
    pool[pages[position // page_tokens], position[:, None] % page_tokens] = keys.transpose(0, 1)
    return pool, pages


CASES = [
    # H, G, w, n, D, page
    (1, 1, 1, 1, 64, 16),
    (1, 1, 1, 2, 64, 16),
    (2, 3, 8, 77, 64, 16),
    (1, 8, 32, 300, 128, 32),
    (2, 4, 32, 33, 80, 16),
    (3, 2, 5, 200, 96, 32),
    (1, 2, 16, 130, 256, 16),
]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "max", "squares"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_shapes_at_their_edges(
    case: tuple[int, ...], reduction: Reduction, dtype: torch.dtype, device: torch.device
) -> None:
    check(case, reduction, dtype, device)


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_random_shapes(data: st.DataObject, device: torch.device) -> None:
    window = data.draw(st.integers(1, 32))
    longest = 1 << 17 if device.type == "cuda" else 400
    case = (
        data.draw(st.integers(1, 3)),
        data.draw(st.integers(1, 8)),
        window,
        data.draw(st.integers(window, longest)),
        data.draw(st.sampled_from([64, 80, 96, 128, 192, 256])),
        data.draw(st.sampled_from([16, 32, 64])),
    )
    reductions: list[Reduction] = ["mean", "max", "squares"]
    reduction = data.draw(st.sampled_from(reductions))
    check(case, reduction, data.draw(st.sampled_from(list(TOLERANCE))), device)


def check(
    case: tuple[int, ...], reduction: Reduction, dtype: torch.dtype, device: torch.device
) -> None:
    heads, group, window, n, dim, page_tokens = case
    generator = torch.Generator().manual_seed(sum(case))
    queries = torch.randn((heads, group, window, dim), generator=generator).to(device, dtype)
    keys = torch.randn((heads, n, dim), generator=generator).to(device, dtype)
    pool, pages = paged(keys, page_tokens, seed=n)
    scores = window_scores(queries, pool, pages, dim**-0.5, n, reduction)
    wanted = expected(queries, keys, dim**-0.5, reduction)
    assert scores.shape == wanted.shape
    if n > window:
        assert relative_error(scores, wanted) < TOLERANCE[dtype]


def test_keys_in_one_piece_give_the_same(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(1)
    queries = torch.randn((2, 3, 8, 64), generator=generator).to(device)
    keys = torch.randn((2, 96, 64), generator=generator).to(device)
    scores = _reduced(queries, keys, 0.125)
    assert relative_error(scores, expected(queries, keys, 0.125, "mean")) < 1e-5
    # As keys lie that are packed dimension by dimension.
    turned = keys.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(_reduced(queries, turned, 0.125), scores)
    pool, pages = paged(keys, 32, seed=1)
    assert torch.equal(_reduced(queries, PagedEntries(pool, pages.t(), 96), 0.125), scores)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "max", "squares"])
@pytest.mark.parametrize("form", [*WITH_SCALES, "a scale for each head"])
def test_keys_of_fewer_bits(
    form: str, reduction: Reduction, dtype: torch.dtype, device: torch.device
) -> None:
    generator = torch.Generator().manual_seed(5)
    queries = torch.randn((3, 2, 8, 64), generator=generator).to(dtype)
    keys = torch.randn((3, 200, 64), generator=generator).to(dtype)
    if form in WITH_SCALES:
        paged_keys, stored = with_scales(keys, form, 16, generator)
    else:
        scales = torch.tensor([0.5, 1.0, 3.0])
        paged_keys, stored = in_bytes(keys, torch.float8_e4m3fn, scales, 16, generator)
    got = _reduced(queries.to(device), to(device, paged_keys), 0.125, reduction)
    wanted = expected(queries, stored, 0.125, reduction)
    assert relative_error(got.cpu(), wanted) < TOLERANCE[dtype]


def to(device: torch.device, entries: PagedEntries) -> PagedEntries:
    quantization = entries.quantization
    assert quantization is not None
    moved = {
        name: value.to(device)
        for name, value in quantization._asdict().items()
        if isinstance(value, Tensor)
    }
    return entries._replace(
        pool=entries.pool.to(device),
        pages=entries.pages.to(device),
        quantization=quantization._replace(**moved),
    )


@pytest.mark.parametrize("reduction", ["mean", "max", "squares"])
def test_heads_of_different_lengths(reduction: Reduction, device: torch.device) -> None:
    lens, window = [40, 9, 300, 129, 8], 8
    generator = torch.Generator().manual_seed(3)
    queries = torch.randn((len(lens), 2, window, 64), generator=generator).to(device)
    keys = torch.randn((len(lens), max(lens), 64), generator=generator).to(device)
    for head, entries in enumerate(lens):
        keys[head, entries:] = torch.nan
    pool, pages = paged(keys, 16, seed=3)
    ragged = PagedEntries(pool, pages.t(), max(lens), torch.tensor(lens, device=device).int())
    scores = _reduced(queries, ragged, 0.125, reduction)
    assert scores.shape == (len(lens), max(lens) - window)
    for head, entries in enumerate(lens):
        one = slice(head, head + 1)
        wanted = expected(queries[one], keys[one, :entries], 0.125, reduction)
        if entries > window:
            assert relative_error(scores[one, : entries - window], wanted) < 1e-5
        assert not scores[head, entries - window :].any()


def test_a_spike_far_away_takes_it_all(device: torch.device) -> None:
    """Logits of hundreds neither overflow nor lose the rest."""
    queries = torch.ones((1, 1, 4, 64), device=device)
    keys = torch.zeros((1, 5000, 64), device=device)
    keys[0, 17] = 10.0
    pool, pages = paged(keys, 32, seed=0)
    scores = window_scores(queries, pool, pages, 1.0, 5000)
    # Float32 knows logits of 640 to 6e-5.
    assert float(scores[0, 17]) == pytest.approx(1.0, abs=1e-4)
    assert float(scores.sum()) == pytest.approx(1.0, abs=1e-4)


def test_a_long_prompt_is_split(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(2)
    n = 128 * 1024 if device.type == "cuda" else 6000
    queries = torch.randn((1, 2, 8, 64), generator=generator).to(device)
    keys = torch.randn((1, n, 64), generator=generator).to(device)
    pool, pages = paged(keys, 32, seed=3)
    scores = window_scores(queries, pool, pages, 0.125, n)
    assert relative_error(scores, expected(queries, keys, 0.125, "mean")) < 1e-5
