"""One more entry for every head of a decode batch: the page tables' work of each step."""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.dispatch import Operation


class Growth(NamedTuple):
    """slots: [L, R, H] int64, page id * page_tokens + offset of each head's new entry.

    fresh: [k, 4] int64, where a page was handed out: (request, layer, head, column).
    """

    slots: Tensor
    fresh: Tensor


@Operation
def grow_tables(
    lens: Tensor, tables: Tensor, pages: Tensor, used: Tensor, granted: Tensor, page_tokens: int
) -> Growth:
    """Adds one entry to each of lens [L, R, H] int32, in place.

    A head whose last page is full takes its request's next page, in the order of layer and head.

    Args:
        tables: [L, R, H, W] int32 page ids, wide enough; changed in place.
        pages: [R, N] int64, the pages granted to each request; `used` [R] of `granted` [R] are
            handed out. `used` is changed in place.

    Raises:
        ValueError: a request has no page left; nothing has changed then.
    """
    layers, requests, heads = lens.shape
    wanted = (lens % page_tokens == 0).sum(dim=(0, 2))
    _check_room(used + wanted, granted)
    slots = torch.empty((layers, requests, heads), dtype=torch.int64)
    fresh = []
    for r in range(requests):
        for layer in range(layers):
            for head in range(heads):
                column, offset = divmod(int(lens[layer, r, head]), page_tokens)
                if offset == 0:
                    tables[layer, r, head, column] = pages[r, used[r]]
                    used[r] += 1
                    fresh.append((r, layer, head, column))
                slots[layer, r, head] = tables[layer, r, head, column] * page_tokens + offset
                lens[layer, r, head] += 1
    return Growth(slots, torch.tensor(fresh, dtype=torch.int64).view(-1, 4))


@grow_tables.on("cpu")
def _grow_tables_at_once(
    lens: Tensor, tables: Tensor, pages: Tensor, used: Tensor, granted: Tensor, page_tokens: int
) -> Growth:
    column = (lens // page_tokens).long()
    offset = lens % page_tokens
    fresh = (offset == 0).transpose(0, 1).nonzero()
    if fresh.shape[0]:
        request, layer, head = fresh.unbind(1)
        wanted = request.bincount(minlength=used.shape[0])
        _check_room(used + wanted, granted)
        before = wanted.cumsum(0) - wanted
        ordinal = torch.arange(request.shape[0]) + (used - before)[request]
        at = column[layer, request, head]
        tables[layer, request, head, at] = pages[request, ordinal].int()
        used += wanted
        fresh = torch.cat((fresh, at[:, None]), dim=1)
    else:
        fresh = fresh.new_empty((0, 4))
    page = tables.gather(3, column[..., None]).squeeze(3).long()
    slots = page * page_tokens + offset
    lens += 1
    return Growth(slots, fresh)


def _check_room(needed: Tensor, granted: Tensor) -> None:
    if bool((needed > granted).any()):
        raise ValueError("a compressed request outgrew its slabs")
