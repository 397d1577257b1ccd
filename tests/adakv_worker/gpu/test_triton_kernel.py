"""What pages store and what sequences attend to, in each format, against numbers that are read."""

import pytest
import torch
from torch import Tensor
from vllm.v1.attention.ops.int4_per_token_head import single_rht

from adakv_serve.kernels.paging.entries import Quantization
from adakv_serve.kernels.paging.growth import GrownStep
from adakv_worker.attention.folded import Folded
from adakv_worker.attention.triton_kernel import Factors, Segments, attend, store, stored_pages
from adakv_worker.stored_dtypes import has_scales, stored_dtype
from tests.adakv_worker.gpu.interpreted import flash_attention

DIM, GROUP, PAGES = 32, 2, 40
# By format: bytes of an entry's keys, entries of a page, and how far numbers may be off.
FORMATS = {
    "fp8": (32, 16, 0.07), "int8_per_token_head": (36, 13, 0.006),
    "fp8_per_token_head": (36, 13, 0.07), "int4_per_token_head": (20, 25, 0.15),
}  # fmt: skip


def _reading(kv_cache_dtype: str) -> Quantization:
    stored = stored_dtype(kv_cache_dtype)
    assert stored is not None
    rotation = None
    if kv_cache_dtype.startswith("int4"):
        rotation = single_rht(torch.eye(DIM), inverse=True) / DIM
    scales = None if has_scales(kv_cache_dtype) else torch.ones(1)
    return Quantization(stored, scales, torch.float32, rotation)


@pytest.mark.parametrize("lens", [(40,), (3, 70, 26), (1, 13, 14, 25, 100)], ids=len)
@pytest.mark.parametrize("kind", FORMATS)
def test_sequences_attend_to_what_was_stored(kind: str, lens: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(len(lens))
    width, page_tokens, most_off = FORMATS[kind]
    pool = torch.randint(0, 255, (PAGES, page_tokens, 1, 2 * width), generator=generator)
    keys, values = pool.to(torch.uint8).chunk(2, dim=-1)
    pages = stored_pages(keys, values, kind)
    tables = torch.randperm(PAGES, generator=generator).int()[: 8 * len(lens)].view(-1, 8)
    sequence = torch.repeat_interleave(torch.arange(len(lens)), torch.tensor(lens))
    place = torch.cat([torch.arange(length) for length in lens])
    slots = tables[sequence, place // page_tokens].long() * page_tokens + place % page_tokens
    one = torch.ones(1)
    exact = [torch.randn((len(slots), 1, DIM), generator=generator) for _ in range(2)]
    store(pages, exact[0], exact[1], slots, one, one)

    read = [
        _reading(kind).read(half[:, :, 0].flatten(0, 1)[slots][None].contiguous())[0]
        for half in (keys, values)
    ]
    for numbers, before in zip(read, exact, strict=True):
        assert float((numbers - before[:, 0]).norm() / before.norm()) < most_off

    query = torch.randn((len(lens), GROUP, DIM), generator=generator)
    output, expected = torch.empty_like(query), torch.empty_like(query)
    starts = torch.arange(len(lens) + 1, dtype=torch.int32)
    entries = torch.tensor(lens, dtype=torch.int32)
    grown = GrownStep(slots[None], tables[None], entries[None], 0)
    segments = Segments.make(GROUP, DIM, query.device)
    folded = Folded(len(lens), grown, pages, starts, 0, len(lens), plan=segments)
    attend(query, output, folded, 0, Factors(DIM**-0.5, 0.0, one, one))
    flash_attention(
        query, *(_in_pages(numbers, slots, page_tokens) for numbers in read), expected, starts, 1,
        entries, 8 * page_tokens, DIM**-0.5, True, tables,
    )  # fmt: skip
    torch.testing.assert_close(output, expected, atol=1e-4, rtol=1e-4)


def _in_pages(numbers: Tensor, slots: Tensor, page_tokens: int) -> Tensor:
    pool = torch.full((PAGES * page_tokens, 1, DIM), torch.nan)
    pool[slots] = numbers[:, None]
    return pool.view(PAGES, page_tokens, 1, DIM)
