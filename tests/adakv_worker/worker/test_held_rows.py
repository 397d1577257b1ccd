"""Held caches in pages and in the host's memory."""

from typing import Any

import psutil
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from adakv_serve.kernels.paging.host_tables import HostTables
from adakv_serve.kernels.paging.layout import PageLayout
from adakv_serve.kernels.paging.paged_cache import PagedCache, placed_slots, read_slots
from adakv_worker.session_messages import HeldCard, Hold
from adakv_worker.worker.held_rows import HeldRows

LAYERS, HEADS, PAGE, DIM = 2, 2, 32, 64
# Of one cache, 4 MiB: a page of a head has 8 KiB of keys, and as much of values.
BLOCKS = 64
CACHES = 40
CARD = HeldCard("", b"", 0, 0, 0, 0, 1, is_named=False)


def memory_mib() -> float:
    return psutil.Process().memory_info().rss / (1 << 20)


def test_the_memory_of_parked_caches_goes_back_when_they_are_dropped() -> None:
    shape = (BLOCKS * LAYERS * HEADS, PAGE, DIM)
    cache = PagedCache(torch.ones(shape), torch.ones(shape))
    layout = PageLayout.layers_outermost(LAYERS, HEADS, BLOCKS)
    tables = HostTables(layout, PAGE, CACHES)
    held = HeldRows(cache, tables)
    lens = torch.full((LAYERS, HEADS), BLOCKS * PAGE, dtype=torch.int32)
    between: list[bytearray] = []

    def park(number: int) -> None:
        held.hold(Hold(str(number), CARD), tables.place(lens, list(range(BLOCKS))))
        held.park(str(number))
        # What an engine allocates meanwhile, and keeps.
        between.extend(bytearray(4096) for _ in range(8))

    def drop_all() -> None:
        for name in list(held.cards):
            held.drop(name)

    # The allocator learns from what is freed which sizes come again.
    park(0)
    drop_all()
    before = memory_mib()
    for number in range(CACHES):
        park(number)
    assert memory_mib() - before > 0.9 * CACHES * 4
    drop_all()
    assert memory_mib() - before < 0.2 * CACHES * 4


class Largest(TorchDispatchMode):
    """Notes the bytes of the largest tensor that pages are read into."""

    nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.index_select.default:
            self.nbytes = max(self.nbytes, made.nbytes)
        return made


@pytest.mark.parametrize("cut", [0, 1, PAGE + 1])
@pytest.mark.parametrize("parked", [False, True], ids=["in pages", "on the host"])
def test_a_cache_that_is_copied_takes_little_memory_beside_it(parked: bool, cut: int) -> None:
    blocks = 1100
    # As CUDA's kernels have it: keys and values of an entry beside each other.
    pool = torch.randn(2 * blocks * LAYERS * HEADS, PAGE, 2 * DIM)
    cache = PagedCache(*pool.chunk(2, dim=2))
    layout = PageLayout.layers_outermost(LAYERS, HEADS, 2 * blocks)
    tables = HostTables(layout, PAGE, 4)
    held = HeldRows(cache, tables)
    lens = torch.tensor([[blocks * PAGE, 99], [PAGE + 2, blocks * PAGE - 7]], dtype=torch.int32)
    row = tables.place(lens, list(range(blocks)))
    kept = [read_slots(cache, slots) for slots in _slots(tables, row, lens - cut)]
    held.hold(Hold("cache", CARD), row)
    with Largest() as largest:
        if parked:
            held.park("cache")
        copy = held.begin("cache", cut, list(range(blocks, 2 * blocks)), copies=True)
    assert torch.equal(tables.lens(copy), lens - cut)
    copied = [read_slots(cache, slots) for slots in _slots(tables, copy, lens - cut)]
    for one, other in zip(kept, copied, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    # On a GPU it is memory that the engine has not set aside.
    assert 0 < largest.nbytes <= 8 << 20


def _slots(tables: HostTables, row: int, lens: torch.Tensor) -> list[torch.Tensor]:
    """Return the slots of each head's first entries."""
    pages = tables.tables(row).flatten(0, 1)
    return [
        placed_slots(pages[head : head + 1], count[None], PAGE)
        for head, count in enumerate(lens.flatten())
    ]
