"""The cost of moving a compressed cache by itself: no engine, no step to wait for, no load."""

import mmap
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ray
import torch

from adakv_serve.kernels.paging.host_tables import HostTables
from adakv_serve.kernels.paging.layout import PageLayout
from adakv_serve.kernels.paging.paged_cache import PagedCache
from adakv_serve.serving.spill.parcels import open_parcels, place_parcels
from adakv_worker.worker.mapped_files import MappedFiles
from adakv_worker.worker.moves import CacheKind, rank_file, read_state, write_state
from adakv_worker.worker.packed_state import CompressedState, StateHeader
from adakv_worker.worker.requests import CompressionState

# SmolLM2-135M in 32-bit floats.
_LAYERS, _HEADS, _PAGE_TOKENS, _DIM = 30, 3, 32, 64
_REQUEST = "request"


class Transfer(NamedTuple):
    """The move of one cache, in milliseconds.

    memcpy_ms: a copy of as many bytes to fresh memory, as a move makes it.
    memcpy_again_ms: a copy to memory in use already, and partly in the processor's caches.
    """

    bytes: int
    export_ms: float
    move_ms: float
    restore_ms: float
    memcpy_ms: float
    memcpy_again_ms: float

    @property
    def share_of_memcpy_speed(self) -> float:
        return self.memcpy_ms / (self.export_ms + self.move_ms + self.restore_ms)

    def figures(self) -> dict[str, Any]:
        rounded = {name: round(value, 3) for name, value in self._asdict().items()}
        return rounded | {"share_of_memcpy_speed": round(self.share_of_memcpy_speed, 3)}


def measure(kept_tokens: int, repeat: int, folder: Path, *, through_ray: bool) -> Transfer:
    """Return medians of moving one request's cache with `kept_tokens` entries for each head.

    Args:
        folder: a folder in memory.
        through_ray: sends the bytes through Ray's object store, as between nodes; else the file
            itself moves, as between replicas of one node.
    """
    slabs = list(range(-(-kept_tokens // _PAGE_TOKENS)))
    here, there = _worker(len(slabs)), _worker(len(slabs))
    header = _header(here)
    lens = torch.full((_LAYERS, _HEADS), kept_tokens, dtype=torch.int32)
    pages = torch.randn((len(slabs) * lens.numel(), _PAGE_TOKENS * _DIM))
    here.restore(_REQUEST, CompressedState(lens, pages, pages), slabs)
    rounds = []
    # Each worker has its own.
    files, arrived_files = MappedFiles(), MappedFiles()
    with tempfile.TemporaryDirectory(dir=folder) as mine:
        left, arrived = Path(mine) / "left", Path(mine) / "arrived"
        for _ in range(repeat + 1):
            file = rank_file(str(left), 0)
            export_ms = _ms(write_state, here, _REQUEST, None, header, file, files)
            move_ms, size = 0.0, file.stat().st_size
            if through_ray:
                move_ms = _ms(_through_ray, left, arrived)
                file = rank_file(str(arrived), 0)
            restore_ms = _ms(_restore, there, file, header, slabs, arrived_files)
            rounds.append((size, export_ms, move_ms, restore_ms, *_memcpy_ms(size)))
    for worker in (here, there):
        worker.check()
    # The first round warms up.
    return Transfer(*map(statistics.median, zip(*rounds[1:], strict=True)))


def _worker(blocks: int) -> CompressionState:
    """Make a worker's state without an engine, with pages packed as vLLM's AVX2 kernels do."""
    pages = blocks * _LAYERS * _HEADS
    keys, values = torch.zeros((pages, 2, _PAGE_TOKENS * _DIM)).unbind(1)
    cache = PagedCache(
        keys.unflatten(1, (_DIM, _PAGE_TOKENS)).transpose(1, 2),
        values.unflatten(1, (_PAGE_TOKENS, _DIM)),
    )
    layout = PageLayout.layers_outermost(_LAYERS, _HEADS, blocks)
    return CompressionState(cache, HostTables(layout, _PAGE_TOKENS, rows=1), [])


def _header(worker: CompressionState) -> StateHeader:
    kind = CacheKind(
        model="SmolLM2-135M", fingerprint="", dtype="float32", query_dtype="float32",
        page_tokens=_PAGE_TOKENS, layers=_LAYERS, heads=_HEADS, head_dim=_DIM, entry_size=_DIM,
        rank=0, ranks=1, packing=worker.packing,
    )  # fmt: skip
    return kind.header("ada_snapkv", [1, 2, 3])


def _through_ray(left: Path, arrived: Path) -> None:
    references = [ray.put(parcel) for parcel in open_parcels(left)]
    place_parcels(ray.get(references), arrived)


def _restore(
    worker: CompressionState, file: Path, header: StateHeader, slabs: list[int], files: MappedFiles
) -> None:
    worker.restore(_REQUEST, read_state(file, header, files).cache, slabs)


def _memcpy_ms(size: int) -> tuple[float, float]:
    """Time a copy to memory fresh from the system, and another one to the same memory."""
    source = torch.ones(size, dtype=torch.uint8)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    with mmap.mmap(-1, size, flags=flags) as fresh:
        target = torch.frombuffer(fresh, dtype=torch.uint8)
        elapsed_ms = _ms(target.copy_, source), _ms(target.copy_, source)
        del target
    return elapsed_ms


def _ms(call: Callable[..., Any], *arguments: Any) -> float:
    started = time.perf_counter()
    call(*arguments)
    return (time.perf_counter() - started) * 1000
