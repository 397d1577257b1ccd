"""Keys or values of one layer, in one tensor or in pages, read a part at a time.

A long prompt's keys are hundreds of MiB in each layer. A scorer that reads parts holds at most
`PART_BYTES` of them, for any model and prompt.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from adakv_serve.kernels.paging.paged_cache import read_heads

# Bytes of one working tensor of a scorer; a scorer holds a handful of them at a time.
PART_BYTES = 16 << 20
# Bytes of the float32 scale that follows an entry's numbers.
SCALE_BYTES = 4
_FOUR_BITS = 0xF


class Quantization(NamedTuple):
    """How a pool of bytes stores the numbers of H heads.

    stored: the dtype of the stored numbers, as wide as the pool's. With uint8 a byte has two
        numbers of four bits, the first one in its low half.
    scales: [H] float32; a number is the stored one times its head's scale. None if each entry has a
        scale of its own, in the four bytes after its numbers. With four bits, the scale's lowest
        four bits are the entry's zero point, which is subtracted from its stored numbers.
    dtype: the dtype in which numbers are read.
    rotation: [D, D] float32. An entry's scaled numbers are multiplied with it. None: no rotation.
    """

    stored: torch.dtype
    scales: Tensor | None
    dtype: torch.dtype
    rotation: Tensor | None = None

    @property
    def has_four_bits(self) -> bool:
        return self.stored == torch.uint8

    def head_size(self, width: int) -> int:
        """Return the numbers of an entry that takes `width` bytes of the pool."""
        numbers = width if self.scales is not None else width - SCALE_BYTES
        return 2 * numbers if self.has_four_bits else numbers

    def head(self, head: int) -> "Quantization":
        """Return how one of the heads is stored."""
        if self.scales is None:
            return self
        return self._replace(scales=self.scales[head : head + 1])

    def read(self, rows: Tensor) -> Tensor:
        """Return the numbers [H, n, D] of entries [H, n, bytes]."""
        if self.scales is not None:
            scales = self.scales.to(self.dtype)[:, None, None]
            return rows.view(self.stored).to(self.dtype).mul_(scales)
        stored, scales = rows[..., :-SCALE_BYTES], own_scales(rows)
        if self.has_four_bits:
            bits = scales.view(torch.int32)
            zeros, scales = bits & _FOUR_BITS, (bits & ~_FOUR_BITS).view(torch.float32)
            pairs = torch.stack((stored & _FOUR_BITS, stored >> 4), dim=-1)
            numbers = pairs.flatten(-2).float().sub_(zeros[..., None])
        else:
            numbers = stored.view(self.stored).float()
        numbers *= scales[..., None]
        if self.rotation is not None:
            numbers = numbers @ self.rotation
        return numbers.to(self.dtype)


def own_scales(rows: Tensor) -> Tensor:
    """View the scales [..., n] float32 that follow the numbers of entries [..., n, bytes]."""
    return rows[..., -SCALE_BYTES:].view(torch.float32)[..., 0]


class PagedEntries(NamedTuple):
    """Keys or values of H heads in an engine's memory.

    pool: [pages, page_tokens, D], with the bytes of an entry in place of D if it is quantized.
    pages: [H, W] int64, each head's pages in order of position.
    num_entries: n; the rest of the last page holds old or foreign entries.
    lens: [H] int32, the entries of each head where they differ, at most n; only functions that
        say so take such heads.
    quantization: how the pool stores numbers; None if it has them as they are.
    """

    pool: Tensor
    pages: Tensor
    num_entries: int
    lens: Tensor | None = None
    quantization: Quantization | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """[H, n, D]."""
        width = self.pool.shape[2]
        size = width if self.quantization is None else self.quantization.head_size(width)
        return self.pages.shape[0], self.num_entries, size

    @property
    def device(self) -> torch.device:
        return self.pool.device

    @property
    def dtype(self) -> torch.dtype:
        return self.pool.dtype if self.quantization is None else self.quantization.dtype

    def head(self, head: int, num_entries: int) -> "PagedEntries":
        """Return the first entries of one head."""
        quantization = None if self.quantization is None else self.quantization.head(head)
        pages = self.pages[head : head + 1]
        return PagedEntries(self.pool, pages, num_entries, None, quantization)

    def read_pages(self, first: int, last: int) -> Tensor:
        """Copy each head's pages [first, last) to [H, (last - first) * page_tokens, D]."""
        entries = read_heads(self.pool, self.pages[:, first:last])
        return entries if self.quantization is None else self.quantization.read(entries)


Entries = Tensor | PagedEntries


def of_all_layers(layers: Sequence[Quantization | None]) -> Quantization | None:
    """Return how the heads of all layers are stored, layer by layer, from one dtype in each."""
    known = [layer for layer in layers if layer is not None]
    if not known:
        return None
    scales = [layer.scales for layer in known if layer.scales is not None]
    return known[0]._replace(scales=torch.cat(scales)) if scales else known[0]


def one_head(entries: Entries, head: int) -> Entries:
    """Return the entries of one head [1, n, D]."""
    if isinstance(entries, PagedEntries):
        return entries.head(head, entries.num_entries)
    return entries[head : head + 1]


def parts(
    entries: Entries, bytes_per_entry: int = 0, *, whole_pages: bool = False
) -> Iterator[tuple[int, Tensor]]:
    """Yield (first position, [H, p, D]) in order, `PART_BYTES` at a time.

    Args:
        bytes_per_entry: bytes that the caller computes from each entry of each head, if they are
            more than the entry has.
        whole_pages: yield the last page whole, with the rest after the last entry: products of
            pages packed by dimension are faster so.
    """
    heads, n, dim = entries.shape
    # Scorers compute in float32.
    size = max(bytes_per_entry, 4 * dim) * heads
    if not isinstance(entries, PagedEntries):
        at_once = max(1, PART_BYTES // size)
        for first in range(0, n, at_once):
            yield first, entries[:, first : first + at_once]
        return
    page_tokens = entries.pool.shape[1]
    pages_at_once = max(1, PART_BYTES // (size * page_tokens))
    for page in range(0, -(-n // page_tokens), pages_at_once):
        first = page * page_tokens
        part = entries.read_pages(page, min(page + pages_at_once, -(-n // page_tokens)))
        yield first, part if whole_pages else part[:, : n - first]


def per_entry(entries: Entries, number: Callable[[Tensor], Tensor]) -> Tensor:
    """Return numbers [H, n] float32 that `number` computes from parts [H, p, D].

    Their memory is allocated first: allocated between parts, they would leave holes into which the
    next part does not fit.
    """
    heads, n, _ = entries.shape
    numbers = torch.empty((heads, n), dtype=torch.float32, device=entries.device)
    for first, part in parts(entries):
        numbers[:, first : first + part.shape[1]] = number(part)
    return numbers


def lengths(part: Tensor) -> Tensor:
    """Return the norms [H, p] float32 of entries [H, p, D], without a copy of them in float32."""
    norms: Tensor = torch.linalg.vector_norm(part, dim=-1, dtype=torch.float32)
    return norms


def read(entries: Entries) -> Tensor:
    """Return all entries [H, n, D]."""
    if isinstance(entries, PagedEntries):
        used = -(-entries.num_entries // entries.pool.shape[1])
        return entries.read_pages(0, used)[:, : entries.num_entries]
    return entries
