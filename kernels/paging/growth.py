"""Growth of compressed caches: by one entry a step while they decode, by many for a new prompt."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Returns the id of request r's page number k, or None beyond its slabs.
NextPage = Callable[[int, int], int | None]


class GrownStep(NamedTuple):
    """One more entry for every head of R requests, in order of request, then head.

    Good until the next step.

    slots: [L, R * H] int64, page id * page_tokens + offset of the new entry.
    tables: [L, R * H, W] int32 page ids.
    lens: [L, R * H] int32 entries, the new one included.
    age: earlier steps of this unchanged batch.
    """

    slots: Tensor
    tables: Tensor
    lens: Tensor
    age: int


class ExtendedStep(NamedTuple):
    """T_r more entries for every head of R requests.

    slots: [L, sum of T_r * H] int64, in order of request, then token, then head.
    tables: [L, R * H, W] int32 page ids, in order of request, then head.
    lens: [L, R * H] int32 entries, the new ones included.
    """

    slots: Tensor
    tables: Tensor
    lens: Tensor


class RowTables(NamedTuple):
    """Page tables of one request.

    lens: [L, H] int32. pages: page ids [L, H, W] int32. used: [1] int, pages in use.
    order: [p] int64, all page ids that it may use, in the order of use.
    """

    lens: Tensor
    pages: Tensor
    used: Tensor
    order: Tensor


def extend_row(row: RowTables, tokens: int, page_tokens: int) -> Tensor:
    """Add entries to every head of a request, in place; return their slots [L, tokens * H] int64.

    Heads take the request's next pages in the order of layer and head. A place beyond its pages has
    the slot -1. Never waits for the device.

    Args:
        row: with `tokens` / `page_tokens` more columns than its heads use, rounded up.
    """
    lens = row.lens.long()
    first = -(-lens // page_tokens)
    fresh = -(-(lens + tokens) // page_tokens) - first
    ends = row.used + fresh.flatten().cumsum(0)
    most = torch.arange(-(-tokens // page_tokens), device=lens.device)
    ordinals = (ends.view_as(fresh) - fresh)[..., None] + most
    there = ordinals < len(row.order)
    pages = torch.where(there, row.order[ordinals.clamp(max=len(row.order) - 1)], -1)
    # Columns past a head's entries are undefined: those that it does not need may be written.
    row.pages.scatter_(2, first[..., None] + most, pages.int())
    positions = lens[..., None] + torch.arange(tokens, device=lens.device)
    page = row.pages.gather(2, positions // page_tokens).long()
    slots = torch.where(page < 0, -1, page * page_tokens + positions % page_tokens)
    row.lens.add_(tokens)
    row.used.copy_(ends[-1:])
    return slots.transpose(1, 2).flatten(1)


def extended(slots: Sequence[Tensor], rows: Sequence[RowTables]) -> ExtendedStep:
    """Return the step of requests that `extend_row` has extended."""
    return ExtendedStep(
        torch.cat(list(slots), dim=1),
        torch.cat([row.pages for row in rows], dim=1),
        torch.cat([row.lens for row in rows], dim=1),
    )


class DecodeBatch:
    """Page tables of R requests that decode together, in the order of attention, on the CPU.

    Every head grows by one entry in each step. So each head needs a page in every `page_tokens`-th
    step, and a step touches only the heads that need one.

    lens: [L, R, H] int32. tables: [L, R, H, W] int32. used: pages that each request has taken.
    """

    def __init__(self, lens: Tensor, tables: Tensor, used: list[int], page_tokens: int) -> None:
        self.lens = lens
        self.tables = tables
        self.used = used
        self._page_tokens = page_tokens
        _, self._requests, self._heads = lens.shape
        flat = lens.flatten().long()
        columns = ((flat - 1) // page_tokens).clamp_(min=0)
        page = tables.view(flat.numel(), -1).gather(1, columns[:, None])[:, 0].long()
        # Slots of the last entries. Where the page is full, the next step takes another.
        self._slots = page * page_tokens + (flat - 1) % page_tokens
        phase = flat % page_tokens
        counts = phase.bincount(minlength=page_tokens).tolist()
        self._by_phase = phase.argsort(stable=True).split(counts)
        self._steps = 0
        self._room = tables.shape[-1] * page_tokens - int(flat.max())

    @property
    def nbytes(self) -> int:
        held = (self.lens, self.tables, self._slots, *self._by_phase)
        return sum(tensor.numel() * tensor.element_size() for tensor in held)

    @property
    def is_wide_enough(self) -> bool:
        """Whether the tables have the columns for one more entry of the longest head."""
        return self._steps < self._room

    def grow(self, next_page: NextPage) -> GrownStep:
        """Do what `grow_reference` does, in place.

        Raises:
            ValueError: a request has no page left; nothing has changed then.
        """
        full = self._by_phase[-self._steps % self._page_tokens]
        fresh = self._take(full, next_page)
        self._slots += 1
        if fresh:
            pages = torch.tensor(fresh)
            self._slots[full] = pages * self._page_tokens
            columns = self.lens.view(-1)[full] // self._page_tokens
            self.tables.view(self._slots.numel(), -1)[full, columns] = pages.int()
        self.lens += 1
        self._steps += 1
        layers = self.lens.shape[0]
        return GrownStep(
            self._slots.view(layers, -1),
            self.tables.view(layers, self._requests * self._heads, -1),
            self.lens.view(layers, -1),
            self._steps - 1,
        )

    def _take(self, full: Tensor, next_page: NextPage) -> list[int]:
        used = list(self.used)
        fresh = []
        for index in full.tolist():
            request = index // self._heads % self._requests
            page = next_page(request, used[request])
            if page is None:
                raise ValueError("a compressed request outgrew its slabs")
            fresh.append(page)
            used[request] += 1
        self.used = used
        return fresh


def grow_reference(
    lens: Tensor, tables: Tensor, used: list[int], page_tokens: int, next_page: NextPage
) -> Tensor:
    """Add one entry to each of lens [L, R, H], in place; return its slots [L, R * H].

    A head whose last page is full takes its request's next page, in the order of layer and head,
    into tables [L, R, H, W]; `used` [R] counts them.
    """
    layers, requests, heads = lens.shape
    slots = torch.empty((layers, requests, heads), dtype=torch.int64)
    for layer in range(layers):
        for request in range(requests):
            for head in range(heads):
                column, offset = divmod(int(lens[layer, request, head]), page_tokens)
                if offset == 0:
                    page = next_page(request, used[request])
                    assert page is not None
                    tables[layer, request, head, column] = page
                    used[request] += 1
                page = int(tables[layer, request, head, column])
                slots[layer, request, head] = page * page_tokens + offset
                lens[layer, request, head] += 1
    return slots.view(layers, -1)
