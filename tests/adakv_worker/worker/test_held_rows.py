"""Held caches in the host's memory."""

import psutil
import torch

from adakv_serve.kernels.paging.host_tables import HostTables
from adakv_serve.kernels.paging.layout import PageLayout
from adakv_serve.kernels.paging.paged_cache import PagedCache
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
