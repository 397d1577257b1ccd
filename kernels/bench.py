"""`python -m kernels.bench`: what the GPU's kernels take, against what its memory and units allow.

Every floor follows from this run's own ceilings, a large copy and a large matrix product: the bytes
that must be moved, each once, or the operations, whichever takes longer. Shapes are those of
Llama-3.1-8B. Needs a CUDA GPU.

Packages whose kernels these are held beside add their figures by an entry point of the group
`kernels.bench`, a `Report`: the attention kernels that read compressed pages are vLLM's.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.blocks import compressed_blocks_bound
from kernels.paging.paged_cache import PagedCache
from kernels.paging.pages import PageLayout
from kernels.policies.head_allocations.adaptive import AdaptiveHeads

LAYERS, HEADS, GROUP, DIM, PAGE, WINDOW = 32, 8, 4, 128, 16, 32
PARAMETERS = 8_030_000_000
DTYPE = torch.bfloat16
_ENTRY_BYTES = 2 * DIM * DTYPE.itemsize


class Ceilings(NamedTuple):
    """What this GPU does in this run: bytes read and written, operations of a bf16 product."""

    bytes_per_s: float
    flops_per_s: float

    def floor_s(self, moved_bytes: int, flops: int) -> float:
        return max(moved_bytes / self.bytes_per_s, flops / self.flops_per_s)


# Prints a table of its own and returns its rows.
Report = Callable[[Ceilings], list[dict[str, Any]]]


class Measured(NamedTuple):
    """One kernel on one size."""

    name: str
    size: str
    moved_bytes: int
    flops: int
    seconds: float

    def row(self, ceilings: Ceilings) -> dict[str, Any]:
        floor = ceilings.floor_s(self.moved_bytes, self.flops)
        return {
            **self._asdict(),
            "bytes_per_s": self.moved_bytes / self.seconds,
            "share_of_copy": self.moved_bytes / self.seconds / ceilings.bytes_per_s,
            "floor_s": floor,
            "share_of_floor": floor / self.seconds,
        }


def seconds(call: Callable[[], Any], *, graph: bool = False) -> float:
    """Median of many runs: cold caches, or launches replayed from a graph where those count."""
    from triton.testing import do_bench, do_bench_cudagraph

    call()
    bench = do_bench_cudagraph if graph else do_bench
    return bench(call, return_mode="median") / 1000


def ceilings() -> Ceilings:
    source = torch.randn(1 << 29, device="cuda")
    target = torch.empty_like(source)
    copied = 2 * source.numel() * source.element_size() / seconds(lambda: target.copy_(source))
    size = 8192
    a, b = torch.randn((2, size, size), device="cuda", dtype=DTYPE)
    return Ceilings(copied, 2 * size**3 / seconds(lambda: a @ b))


class Prompt:
    """A prompt in pages of a few layers, with room for what is kept, in random order."""

    def __init__(self, tokens: int, layers: int, device: str) -> None:
        blocks = -(-tokens // PAGE)
        half = layers * HEADS * blocks
        self.tokens, self.layers = tokens, layers
        content = torch.randn((2 * half, PAGE, 2 * DIM), device=device, dtype=DTYPE)
        self.cache = PagedCache(content[..., :DIM], content[..., DIM:])
        order = torch.randperm(2 * half, device=device)
        self.source = order[:half].view(layers, blocks, HEADS)
        self.tables = order[half:].view(layers, HEADS, blocks).int()
        self.queries = torch.randn((HEADS, GROUP, WINDOW, DIM), device=device, dtype=DTYPE)

    def kept(self, share: float) -> Tensor:
        shape = (self.layers, HEADS, self.tokens)
        return torch.rand(shape, device=self.source.device) < share

    def score(self, layer: int) -> Tensor:
        from kernels.gpu.window_scores import window_scores

        return window_scores(
            self.queries, self.cache.keys, self.source[layer], DIM**-0.5, self.tokens
        )


def measure(tokens: int, device: str) -> Iterator[Measured]:
    from kernels.gpu.compaction import (
        QuantizedCache,
        compact_paged,
        compact_pages_in_place,
        compact_quantized,
    )
    from kernels.gpu.top import radix_top_mask

    layers = max(1, min(LAYERS, (1 << 19) // tokens))
    prompt = Prompt(tokens, layers, device)
    size = f"{tokens} tokens"
    rows = GROUP * WINDOW
    yield Measured(
        "window scores, a layer",
        size,
        2 * HEADS * tokens * DIM * DTYPE.itemsize,
        2 * 2 * HEADS * rows * tokens * DIM,
        seconds(lambda: prompt.score(0)),
    )
    scores = torch.rand((1, HEADS * tokens), device=device)
    count = torch.tensor([HEADS * tokens // 4], device=device)
    yield Measured(
        "selection, a layer's heads",
        size,
        scores.numel() * (scores.element_size() + 1),
        0,
        seconds(lambda: radix_top_mask(scores, count)),
    )
    kept = prompt.kept(0.25)
    lens = kept.sum(dim=-1, dtype=torch.int32)
    moved = 2 * int(lens.sum()) * _ENTRY_BYTES + kept.numel()
    copied = f"{size}, {layers} layers, a quarter kept"
    yield Measured(
        "compaction",
        copied,
        moved,
        0,
        seconds(lambda: compact_paged(kept, prompt.cache, prompt.source, prompt.tables, lens)),
    )
    pages = prompt.cache.keys.shape[0]
    content = torch.empty((2, pages, PAGE, DIM), device=device, dtype=torch.int8)
    scales = torch.empty((2, pages, PAGE), device=device)
    target = QuantizedCache(content[0], content[1], scales[0], scales[1])
    yield Measured(
        "compaction to int8",
        copied,
        int(lens.sum()) * (_ENTRY_BYTES + 2 * (DIM + 4)) + kept.numel(),
        0,
        seconds(
            lambda: compact_quantized(kept, prompt.cache, prompt.source, prompt.tables, target)
        ),
    )
    yield Measured(
        "compaction in place",
        copied,
        moved,
        0,
        seconds(lambda: compact_pages_in_place(kept, prompt.cache, prompt.tables, lens)),
    )


def measure_growth(requests: int, device: str) -> Measured:
    """One step's page tables of a batch, replayed from a graph."""
    from kernels.gpu.tables import grow_by_one

    layout = PageLayout.blocks_outermost(LAYERS, HEADS)
    layout = layout._replace(offsets=layout.offsets.to(device))
    lens = torch.randint(1000, 2000, (LAYERS, requests, HEADS), device=device, dtype=torch.int32)
    # Wide and long enough for as many steps as the measurement takes.
    tables = torch.zeros((LAYERS, requests, HEADS, 8192), device=device, dtype=torch.int32)
    slabs = torch.arange(requests * 8192, device=device, dtype=torch.int32).view(requests, -1)
    used = torch.zeros(requests, device=device, dtype=torch.int32)
    granted = torch.full((requests,), 8192, device=device, dtype=torch.int32)
    sequences = LAYERS * requests * HEADS
    # Lengths read and written, a page id read or written, a slot written.
    moved = sequences * (4 + 4 + 4 + 8)
    taken = seconds(
        lambda: grow_by_one(lens, tables, used, slabs, granted, layout, PAGE), graph=True
    )
    return Measured("growth, a step", f"{requests} requests, all layers", moved, 0, taken)


def compression_over_prefill(
    tokens: int, keep: int, limits: Ceilings, device: str
) -> dict[str, float]:
    """Seconds to compress a prompt of all layers, and its prefill's at the product's rate."""
    from kernels.gpu.compaction import compact_paged
    from kernels.gpu.tables import place_pages

    prompt = Prompt(tokens, 1, device)
    layout = PageLayout.blocks_outermost(1, HEADS)
    layout = layout._replace(offsets=layout.offsets.to(device))
    slabs = torch.arange(
        compressed_blocks_bound(keep, 0, PAGE), device=device, dtype=torch.int32
    )  # fmt: skip
    width = -(-min(tokens, keep * HEADS) // PAGE)

    def layer() -> None:
        scores = torch.nn.functional.max_pool1d(prompt.score(0), 7, 1, 3)
        older = AdaptiveHeads().allocate(scores[None], [HEADS * (keep - WINDOW)])
        kept = torch.nn.functional.pad(older, (0, WINDOW), value=True)
        lens = kept.sum(dim=-1, dtype=torch.int32)
        used = torch.zeros(1, dtype=torch.int32, device=device)
        tables = place_pages(lens, slabs, used, layout, PAGE, width)
        # Its own pages: what is measured must not depend on what it has overwritten.
        tables = torch.where(tables < 0, tables, prompt.tables[..., :width])
        compact_paged(kept, prompt.cache, prompt.source, tables, lens)

    compress = LAYERS * seconds(layer)
    prefill = 2 * PARAMETERS * tokens / limits.flops_per_s
    return {
        "tokens": tokens,
        "keep_tokens": keep,
        "compress_s": compress,
        "prefill_floor_s": prefill,
        "share_of_prefill_floor": compress / prefill,
    }


def _measurements(lengths: list[int], requests: int, device: str) -> Iterator[Measured]:
    for tokens in lengths:
        yield from measure(tokens, device)
    yield measure_growth(requests, device)


def report(lengths: list[int], requests: int) -> dict[str, Any]:
    limits = ceilings()
    print(f"{torch.cuda.get_device_name()}: copies {limits.bytes_per_s / 1e12:.2f} TB/s, ", end="")
    print(f"multiplies {limits.flops_per_s / 1e12:.0f} TFLOP/s")
    print(f"{'kernel':28}{'size':44}{'time':>10}{'of copy':>9}{'of floor':>10}")
    rows = []
    for measured in _measurements(lengths, requests, device="cuda"):
        row = measured.row(limits)
        rows.append(row)
        print(
            f"{measured.name:28}{measured.size:44}{measured.seconds * 1e6:8.1f}us"
            f"{row['share_of_copy']:9.2f}{row['share_of_floor']:10.2f}",
            flush=True,
        )
    prompts = [compression_over_prefill(n, max(WINDOW, n // 4), limits, "cuda") for n in lengths]
    for prompt in prompts:
        print(
            f"a prompt of {prompt['tokens']}: compressed in {prompt['compress_s'] * 1e3:.2f} ms, "
            f"{prompt['share_of_prefill_floor']:.2%} of what its prefill takes at least"
        )
    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        **limits._asdict(),
        "kernels": rows,
        "prompts": prompts,
        **reports_of_others(limits),
    }


def reports_of_others(limits: Ceilings) -> dict[str, list[dict[str, Any]]]:
    """By name; one whose package cannot be imported here is named and left out."""
    reports = {}
    for entry in entry_points(group="kernels.bench"):
        try:
            report_of_another: Report = entry.load()
        except ImportError as error:
            print(f"{entry.name}: left out, {error}")
            continue
        reports[entry.name] = report_of_another(limits)
    return reports


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kernels.bench", description=__doc__)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--tokens", type=int, nargs="+", default=[6000, 32768, 131072])
    parser.add_argument("--requests", type=int, default=256, help="of the step that grows")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("kernels.bench: needs a CUDA GPU, and there is none", file=sys.stderr)
        return 2
    result = report(args.tokens, args.requests)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
