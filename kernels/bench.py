"""`python -m kernels.bench`: times of the GPU kernels against what memory and arithmetic allow.

The floor of a kernel follows from two ceilings of the same run, a large copy and a large matrix
product: the bytes that must move, each once, or the operations, the slower of the two. Shapes are
those of Llama-3.1-8B. Needs a CUDA GPU.

Other packages add figures by an entry point of the group `kernels.bench`, which is a `Report`.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from adakv_serve.kernels.blocks import blocks_for_tokens, compressed_blocks_bound
from adakv_serve.kernels.paging.layout import PageLayout
from adakv_serve.kernels.paging.paged_cache import PagedCache
from adakv_serve.kernels.policies.attention import pool
from adakv_serve.kernels.policies.head_allocations.adaptive import AdaptiveHeads

LAYERS, HEADS, GROUP, DIM, PAGE, WINDOW = 32, 8, 4, 128, 16, 32
PARAMETERS = 8_030_000_000
DTYPE = torch.bfloat16
_ENTRY_BYTES = 2 * DIM * DTYPE.itemsize


class Ceilings(NamedTuple):
    """Bytes that a copy reads and writes, and operations of a bf16 product, on this GPU."""

    bytes_per_s: float
    flops_per_s: float

    def floor_s(self, moved_bytes: int, flops: int) -> float:
        return max(moved_bytes / self.bytes_per_s, flops / self.flops_per_s)


Row = Mapping[str, object]
# Prints a table and returns its rows.
Report = Callable[[Ceilings], Sequence[Row]]


class Timer(Protocol):
    """Measures the seconds of a call.

    graph: replay the call from a CUDA graph, for calls that are dominated by launches.
    """

    def __call__(self, call: Callable[[], object], *, graph: bool = False) -> float: ...


class Measured(NamedTuple):
    """One kernel on one size."""

    name: str
    size: str
    moved_bytes: int
    flops: int
    seconds: float

    def share_of_copy(self, ceilings: Ceilings) -> float:
        return self.moved_bytes / self.seconds / ceilings.bytes_per_s

    def share_of_floor(self, ceilings: Ceilings) -> float:
        return ceilings.floor_s(self.moved_bytes, self.flops) / self.seconds

    def row(self, ceilings: Ceilings) -> Row:
        return {
            **self._asdict(),
            "bytes_per_s": self.moved_bytes / self.seconds,
            "share_of_copy": self.share_of_copy(ceilings),
            "floor_s": ceilings.floor_s(self.moved_bytes, self.flops),
            "share_of_floor": self.share_of_floor(ceilings),
        }


class PromptCost(NamedTuple):
    """Seconds to compress a prompt in all layers, and the least that its prefill takes."""

    tokens: int
    keep_tokens: int
    compress_s: float
    prefill_floor_s: float
    share_of_prefill_floor: float


def seconds(call: Callable[[], object], *, graph: bool = False) -> float:
    """Return the median time of many runs, with cold caches or replayed from a graph."""
    from triton.testing import do_bench, do_bench_cudagraph

    call()
    bench = do_bench_cudagraph if graph else do_bench
    return float(bench(call, return_mode="median")) / 1000


def ceilings() -> Ceilings:
    """Measure the ceilings of this GPU."""
    source = torch.randn(1 << 29, device="cuda")
    target = torch.empty_like(source)
    copied = 2 * source.numel() * source.element_size() / seconds(lambda: target.copy_(source))
    a, b = torch.randn((2, 8192, 8192), device="cuda", dtype=DTYPE)
    return Ceilings(copied, 2 * len(a) ** 3 / seconds(lambda: a @ b))


class Prompt:
    """A prompt in scattered pages of a few layers, with pages for the entries that stay."""

    def __init__(self, tokens: int, layers: int, heads: int, device: str) -> None:
        blocks = blocks_for_tokens(tokens, PAGE)
        half = layers * heads * blocks
        self.tokens, self.layers = tokens, layers
        content = torch.randn((2 * half, PAGE, 2 * DIM), device=device, dtype=DTYPE)
        self.cache = PagedCache(content[..., :DIM], content[..., DIM:])
        order = torch.randperm(2 * half, device=device)
        self.source = order[:half].view(layers, blocks, heads)
        self.tables = order[half:].view(layers, heads, blocks).int()
        self.queries = torch.randn((heads, GROUP, WINDOW, DIM), device=device, dtype=DTYPE)

    def score(self, layer: int) -> Tensor:
        """Return the window scores [H, n - w] of a layer."""
        from adakv_serve.kernels.gpu.window_scores import window_scores

        return window_scores(
            self.queries, self.cache.keys, self.source[layer], DIM**-0.5, self.tokens
        )


class Bench(NamedTuple):
    """Measurements of all kernels on one device.

    layers, heads: sizes of the model.
    timer: measures a call.
    """

    device: str = "cuda"
    layers: int = LAYERS
    heads: int = HEADS
    timer: Timer = seconds

    def measurements(self, lengths: Sequence[int], requests: int) -> Iterator[Measured]:
        """Yield the kernels of compression for each length, then the growth of a batch."""
        for tokens in lengths:
            layers = max(1, min(self.layers, (1 << 19) // tokens))
            prompt = Prompt(tokens, layers, self.heads, self.device)
            yield self._window_scores(prompt)
            yield self._selection(tokens)
            yield from self._compactions(prompt)
        yield self._growth(requests)

    def _window_scores(self, prompt: Prompt) -> Measured:
        return Measured(
            "window scores, a layer",
            f"{prompt.tokens} tokens",
            2 * self.heads * prompt.tokens * DIM * DTYPE.itemsize,
            2 * 2 * self.heads * GROUP * WINDOW * prompt.tokens * DIM,
            self.timer(lambda: prompt.score(0)),
        )

    def _selection(self, tokens: int) -> Measured:
        from adakv_serve.kernels.gpu.top import radix_top_mask

        scores = torch.rand((1, self.heads * tokens), device=self.device)
        count = torch.tensor([self.heads * tokens // 4], device=self.device)
        return Measured(
            "selection, a layer's heads",
            f"{tokens} tokens",
            scores.numel() * (scores.element_size() + 1),
            0,
            self.timer(lambda: radix_top_mask(scores, count)),
        )

    def _compactions(self, prompt: Prompt) -> Iterator[Measured]:
        from adakv_serve.kernels.gpu.compaction import compact_paged, compact_pages_in_place

        shape = (prompt.layers, self.heads, prompt.tokens)
        kept = torch.rand(shape, device=self.device) < 0.25
        lens = kept.sum(dim=-1, dtype=torch.int32)
        moved = 2 * int(lens.sum()) * _ENTRY_BYTES + kept.numel()
        size = f"{prompt.tokens} tokens, {prompt.layers} layers, a quarter kept"
        cache, tables = prompt.cache, prompt.tables
        taken = self.timer(lambda: compact_paged(kept, cache, prompt.source, tables, lens))
        yield Measured("compaction", size, moved, 0, taken)
        taken = self.timer(lambda: compact_pages_in_place(kept, cache, tables, lens))
        yield Measured("compaction in place", size, moved, 0, taken)

    def _growth(self, requests: int) -> Measured:
        """Measure one step's page tables of a batch."""
        from adakv_serve.kernels.gpu.tables import grow_by_one

        layers, heads, device = self.layers, self.heads, self.device
        shape = (layers, requests, heads)
        lens = torch.randint(1000, 2000, shape, device=device, dtype=torch.int32)
        # Wide and long enough for the steps of a measurement.
        tables = torch.zeros((*shape, 8192), device=device, dtype=torch.int32)
        slabs = torch.arange(requests * 8192, device=device, dtype=torch.int32).view(requests, -1)
        used = torch.zeros(requests, device=device, dtype=torch.int32)
        granted = torch.full((requests,), 8192, device=device, dtype=torch.int32)
        layout = self._layout(layers)
        # A length read and written, a page id read or written, a slot written.
        moved = lens.numel() * (4 + 4 + 4 + 8)
        taken = self.timer(
            lambda: grow_by_one(lens, tables, used, slabs, granted, layout, PAGE), graph=True
        )
        return Measured("growth, a step", f"{requests} requests, all layers", moved, 0, taken)

    def prompt_cost(self, tokens: int, keep: int, limits: Ceilings) -> PromptCost:
        """Measure the compression of a prompt, all layers alike, against its prefill."""
        from adakv_serve.kernels.gpu.compaction import compact_paged
        from adakv_serve.kernels.gpu.tables import place_pages

        heads, device = self.heads, self.device
        prompt, layout = Prompt(tokens, 1, heads, device), self._layout(1)
        blocks = compressed_blocks_bound(keep, 0, PAGE)
        slabs = torch.arange(blocks, device=device, dtype=torch.int32)
        width = blocks_for_tokens(min(tokens, keep * heads), PAGE)

        def layer() -> None:
            scores = pool(prompt.score(0), 7, "max")
            older = AdaptiveHeads().allocate(scores[None], [heads * (keep - WINDOW)])
            kept = torch.nn.functional.pad(older, (0, WINDOW), value=True)
            lens = kept.sum(dim=-1, dtype=torch.int32)
            used = torch.zeros(1, dtype=torch.int32, device=device)
            tables = place_pages(lens, slabs, used, layout, PAGE, width)
            # Pages that are no source, so that each run reads the same content.
            tables = torch.where(tables < 0, tables, prompt.tables[..., :width])
            compact_paged(kept, prompt.cache, prompt.source, tables, lens)

        prefill_s = 2 * PARAMETERS * tokens / limits.flops_per_s
        compress_s = self.layers * self.timer(layer)
        return PromptCost(tokens, keep, compress_s, prefill_s, compress_s / prefill_s)

    def _layout(self, layers: int) -> PageLayout:
        layout = PageLayout.blocks_outermost(layers, self.heads)
        return layout._replace(offsets=layout.offsets.to(self.device))


def report(lengths: Sequence[int], requests: int) -> dict[str, object]:
    """Measure everything, print it, and return it."""
    limits, bench = ceilings(), Bench()
    print(f"{torch.cuda.get_device_name()}: copies {limits.bytes_per_s / 1e12:.2f} TB/s, ", end="")
    print(f"multiplies {limits.flops_per_s / 1e12:.0f} TFLOP/s")
    print(f"{'kernel':28}{'size':44}{'time':>10}{'of copy':>9}{'of floor':>10}")
    rows = []
    for measured in bench.measurements(lengths, requests):
        rows.append(measured.row(limits))
        print(
            f"{measured.name:28}{measured.size:44}{measured.seconds * 1e6:8.1f}us"
            f"{measured.share_of_copy(limits):9.2f}{measured.share_of_floor(limits):10.2f}",
            flush=True,
        )
    prompts = [bench.prompt_cost(n, max(WINDOW, n // 4), limits) for n in lengths]
    for tokens, _, compress_s, _, share in prompts:
        print(f"a prompt of {tokens}: compressed in {compress_s * 1e3:.2f} ms, ", end="")
        print(f"{share:.2%} of its prefill's floor")
    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        **limits._asdict(),
        "kernels": rows,
        "prompts": [prompt._asdict() for prompt in prompts],
        **reports_of_others(limits),
    }


def reports_of_others(limits: Ceilings) -> dict[str, Sequence[Row]]:
    """Return other packages' reports by name, without those that cannot be imported here."""
    reports: dict[str, Sequence[Row]] = {}
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
