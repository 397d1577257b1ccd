"""`python -m adakv_worker.attention_bench`: folded decodes against stock ones at equal bytes.

Stock: R requests of H KV heads, all of one length. Folded: R * H sequences of one head whose
lengths vary as those of compressed heads do, with an equal sum. Both read the same number of bytes,
so the difference in time is the cost of folding. Heads as in Llama-3.1-8B. Needs a CUDA GPU.
`python -m kernels.bench` prints this too if this package is installed.

`--bits`: folded decodes from pages of fewer bits against those of bf16, with as many entries.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from vllm.config import AttentionConfig
from vllm.v1.attention.backends import flash_attn, triton_attn
from vllm.v1.kv_cache_interface import KVQuantMode, get_kv_quant_mode

from adakv_serve.kernels.bench import DIM, DTYPE, GROUP, HEADS, PAGE, Ceilings, ceilings, seconds
from adakv_worker.attention.folded import Pages
from adakv_worker.attention.gpu import folded_splits
from adakv_worker.attention.triton_kernel import stored_pages
from adakv_worker.stored_dtypes import quantized_bytes

# Deviation of the logarithm of a head's length: a tenth of the heads keep more than twice the mean,
# as with adaptive heads.
_SKEW = 0.8
# What `sweep` compares: most parts of a sequence, and sequences up to which each is split.
_PARTS = (1, 2, 4, 8, 32)
_SPLIT_SEQUENCES = (0, 4096)
# What `bits` compares, by vLLM's `kv_cache_dtype`.
_FEWER_BITS = ("fp8", "int8_per_token_head", "fp8_per_token_head", "int4_per_token_head")


class Sequences(NamedTuple):
    """Arguments of an attention kernel.

    query, output: [S, heads * GROUP, D].
    pages: keys and values [pages, page_tokens, heads, D]; with the bytes of an entry in place of D
        where they store fewer bits.
    """

    query: Tensor
    pages: Pages
    output: Tensor
    starts: Tensor
    lens: Tensor
    tables: Tensor

    @property
    def heads(self) -> int:
        return self.pages.keys.shape[2]

    @property
    def room(self) -> int:
        """Entries for which each table has room."""
        return self.tables.shape[1] * self.pages.keys.shape[1]

    @property
    def kv_bytes(self) -> int:
        keys = self.pages.keys
        # The stride covers keys and values of all heads, and their scales.
        return int(self.lens.sum()) * keys.stride(1) * keys.element_size()


Attend = Callable[[Sequences], Any]


def flash(s: Sequences, splits: int | None = None) -> None:
    """Attend with FlashAttention.

    Args:
        splits: most parts of a sequence; None for as our backend calls it for folded sequences.
    """
    version = flash_attn.get_flash_attn_version() or 2
    if splits is None:
        most = AttentionConfig.flash_attn_max_num_splits_for_cuda_graph
        splits = folded_splits(len(s.lens), version, most) if s.heads == 1 else 0
    flash_attn.flash_attn_varlen_func(
        q=s.query, k=s.pages.keys, v=s.pages.values, out=s.output, cu_seqlens_q=s.starts,
        max_seqlen_q=1, seqused_k=s.lens, max_seqlen_k=s.room, softmax_scale=DIM**-0.5,
        causal=True, block_table=s.tables, fa_version=version, num_splits=splits,
    )  # fmt: skip


def triton_unified(s: Sequences, most: int | None = None) -> None:
    """Attend with vLLM's kernel in Triton.

    Args:
        most: sequences up to which each is split; None for as our backend calls it.
    """
    count, segments = s.query.shape[0], triton_attn.NUM_PAR_SOFTMAX_SEGMENTS
    if most is None:
        most = triton_attn.MIN_LAUNCH_GRID_SIZE_2D // s.heads
    shape = (min(most, count), s.query.shape[1], segments)
    sizes = ((*shape, DIM), shape, shape)
    outputs, maxima, sums = (torch.empty(size, device=s.query.device) for size in sizes)
    mode = get_kv_quant_mode(s.pages.kv_cache_dtype)
    one = None if mode != KVQuantMode.FP8_PER_TENSOR else torch.ones(1, device=s.query.device)
    triton_attn.unified_attention(
        q=s.query, k=s.pages.keys, v=s.pages.values, out=s.output, cu_seqlens_q=s.starts,
        max_seqlen_q=1, seqused_k=s.lens, max_seqlen_k=s.room, softmax_scale=DIM**-0.5,
        causal=True, window_size=(-1, -1), block_table=s.tables, softcap=0.0,
        q_descale=None, k_descale=one, v_descale=one,
        kv_quant_mode=mode, k_scale_cache=s.pages.key_scales, v_scale_cache=s.pages.value_scales,
        seq_threshold_3D=most, num_par_softmax_segments=segments, softmax_segm_output=outputs,
        softmax_segm_max=maxima, softmax_segm_expsum=sums,
    )  # fmt: skip


def sequences(lens: Tensor, heads: int, kv_cache_dtype: str = "auto") -> Sequences:
    """Return sequences with pages in random order, as in memory that has been in use.

    Args:
        kv_cache_dtype: how pages store numbers; they have the bytes of PAGE entries of bf16.
    """
    device, count = lens.device, lens.numel()
    page_tokens = PAGE
    if kv_cache_dtype != "auto":
        page_tokens = PAGE * 2 * DIM * DTYPE.itemsize // quantized_bytes(DIM, kv_cache_dtype)
    width = -(-int(lens.max()) // page_tokens)
    needed = -(-lens.long() // page_tokens)
    pages = int(needed.sum())
    tables = torch.zeros((count, width), dtype=torch.int32, device=device)
    owned = torch.arange(width, device=device) < needed[:, None]
    tables[owned] = torch.randperm(pages, device=device).int()
    query = torch.randn((count, heads * GROUP, DIM), device=device, dtype=DTYPE)
    starts = torch.arange(count + 1, dtype=torch.int32, device=device)
    pool = _filled((pages, page_tokens, heads), kv_cache_dtype, device)
    return Sequences(query, pool, torch.empty_like(query), starts, lens, tables)


def _filled(shape: tuple[int, int, int], kv_cache_dtype: str, device: torch.device) -> Pages:
    """Return pages [pages, page_tokens, heads] of random numbers."""
    if kv_cache_dtype == "auto":
        pool = torch.randn((*shape, 2 * DIM), device=device, dtype=DTYPE)
        keys, values = pool.chunk(2, dim=-1)
        return Pages(keys, values)
    # Bytes that are numbers in each format.
    size = (*shape, quantized_bytes(DIM, kv_cache_dtype))
    pool = torch.randint(0, 0x70, size, device=device, dtype=torch.uint8)
    keys, values = pool.chunk(2, dim=-1)
    pages = stored_pages(keys, values, kv_cache_dtype)
    for scales in (pages.key_scales, pages.value_scales):
        if scales is not None:
            scales.fill_(0.01)
    return pages


def skewed(requests: int, mean: int, device: str) -> Tensor:
    """Return lengths [R * H] int32 of heads that keep `mean` on average, at least one each."""
    weights = (torch.randn(requests, HEADS, device=device) * _SKEW).exp()
    lens = (weights / weights.mean(dim=1, keepdim=True) * mean).long().clamp_(min=1)
    lens[:, 0] += mean * HEADS - lens.sum(dim=1)
    return lens.clamp_(min=1).view(-1).int()


def measure(attend: Attend, requests: int, mean: int, device: str) -> dict[str, Any]:
    stock = sequences(torch.full((requests,), mean, dtype=torch.int32, device=device), HEADS)
    folded = sequences(skewed(requests, mean, device), 1)
    stock_s, folded_s = (seconds(partial(attend, one)) for one in (stock, folded))
    return {
        "kernel": attend.__name__,
        "requests": requests,
        "mean_entries": mean,
        "kv_bytes": stock.kv_bytes,
        "folded_kv_bytes": folded.kv_bytes,
        "stock_s": stock_s,
        "folded_s": folded_s,
        # Lengths are integers, so the bytes are only nearly equal.
        "ratio_at_equal_bytes": folded_s / stock_s * stock.kv_bytes / folded.kv_bytes,
    }


def sweep(
    requests: Sequence[int], entries: Sequence[int], device: str = "cuda"
) -> list[dict[str, Any]]:
    """Print how long folded sequences take with other limits on their parts."""
    rows = []
    for count in requests:
        for mean in entries:
            folded = sequences(skewed(count, mean, device), 1)
            for attend, limits in ((flash, _PARTS), (triton_unified, _SPLIT_SEQUENCES)):
                taken = {most: seconds(partial(attend, folded, most)) for most in limits}
                name = attend.__name__
                rows.append({
                    "kernel": name, "requests": count, "mean_entries": mean, "seconds": taken,
                })  # fmt: skip
                figures = "  ".join(f"{most}: {s * 1e6:.1f}us" for most, s in taken.items())
                print(f"{name:16}{count:9}{mean:9}  {figures}", flush=True)
    return rows


def bits(
    requests: Sequence[int], entries: Sequence[int], device: str = "cuda"
) -> list[dict[str, Any]]:
    """Print how long folded sequences take whose pages store fewer bits, with as many entries."""
    rows = []
    print(f"{'pages':22}{'requests':>9}{'entries':>9}{'folded':>12}{'of bf16':>9}{'bytes':>7}")
    for count in requests:
        for mean in entries:
            lens = skewed(count, mean, device)
            whole = sequences(lens, 1)
            whole_s = seconds(partial(triton_unified, whole))
            for kind in ("auto", *_FEWER_BITS):
                folded = whole if kind == "auto" else sequences(lens, 1, kind)
                took_s = whole_s if kind == "auto" else seconds(partial(triton_unified, folded))
                rows.append({
                    "pages": kind, "requests": count, "mean_entries": mean, "folded_s": took_s,
                    "ratio": took_s / whole_s, "bytes_ratio": folded.kv_bytes / whole.kv_bytes,
                })  # fmt: skip
                print(f"{kind:22}{count:9}{mean:9}{took_s * 1e6:10.1f}us{took_s / whole_s:9.2f}"
                      f"{folded.kv_bytes / whole.kv_bytes:7.2f}", flush=True)  # fmt: skip
    return rows


def report(
    limits: Ceilings,
    requests: Sequence[int] = (1, 16, 64, 256),
    entries: Sequence[int] = (256, 1500, 6000),
    device: str = "cuda",
) -> list[dict[str, Any]]:
    """Print a line for each kernel, number of requests and mean entries of a head."""
    print(f"{'attention':16}{'requests':>9}{'entries':>9}{'stock':>12}{'folded':>12}{'ratio':>7}"
          f"{'of copy':>9}")  # fmt: skip
    rows = []
    for attend in (flash, triton_unified):
        for count in requests:
            for mean in entries:
                row = measure(attend, count, mean, device)
                # A copy reads and writes; attention reads.
                share = row["folded_kv_bytes"] / row["folded_s"] / limits.bytes_per_s
                rows.append({**row, "share_of_copy": share})
                times = "".join(f"{row[name] * 1e6:10.1f}us" for name in ("stock_s", "folded_s"))
                ratio = row["ratio_at_equal_bytes"]
                name = row["kernel"]
                print(f"{name:16}{count:9}{mean:9}{times}{ratio:7.2f}{share:9.2f}", flush=True)
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m adakv_worker.attention_bench")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--entries", type=int, nargs="+", default=[256, 1500, 6000])
    parser.add_argument("--sweep", action="store_true", help="of limits on a sequence's parts")
    parser.add_argument("--bits", action="store_true", help="pages of fewer bits, in Triton")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("attention_bench: needs a CUDA GPU, and there is none", file=sys.stderr)
        return 2
    for name, compare in (("sweep", sweep), ("bits", bits)):
        if getattr(args, name):
            rows = compare(args.requests, args.entries)
            if args.json:
                args.json.write_text(json.dumps({name: rows}, indent=2) + "\n")
            return 0
    limits = ceilings()
    print(f"{torch.cuda.get_device_name()}: copies {limits.bytes_per_s / 1e12:.2f} TB/s")
    rows = report(limits, args.requests, args.entries)
    if args.json:
        args.json.write_text(json.dumps({**limits._asdict(), "attention": rows}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
