"""`python -m adakv_worker.attention_bench`: folded decodes against stock ones at equal bytes.

Stock: R requests of H KV heads, all of one length. Folded: R * H sequences of one head whose
lengths vary as those of compressed heads do, with an equal sum. Both read the same number of bytes,
so the difference in time is the cost of folding. Heads as in Llama-3.1-8B. Needs a CUDA GPU.
`python -m kernels.bench` prints this too if this package is installed.
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

from adakv_serve.kernels.bench import DIM, DTYPE, GROUP, HEADS, PAGE, Ceilings, ceilings, seconds
from adakv_worker.attention.gpu import folded_splits

# Deviation of the logarithm of a head's length: a tenth of the heads keep more than twice the mean,
# as with adaptive heads.
_SKEW = 0.8
# What `sweep` compares: most parts of a sequence, and sequences up to which each is split.
_PARTS = (1, 2, 4, 8, 32)
_SPLIT_SEQUENCES = (0, 4096)


class Sequences(NamedTuple):
    """Arguments of an attention kernel.

    query, output: [S, heads * GROUP, D]. keys, values: [pages, PAGE, heads, D].
    """

    query: Tensor
    keys: Tensor
    values: Tensor
    output: Tensor
    starts: Tensor
    lens: Tensor
    tables: Tensor

    @property
    def kv_bytes(self) -> int:
        entries = int(self.lens.sum()) * self.keys.shape[2]
        return 2 * entries * DIM * self.keys.element_size()


Attend = Callable[[Sequences], Any]


def flash(s: Sequences, splits: int | None = None) -> None:
    """Attend with FlashAttention.

    Args:
        splits: most parts of a sequence; None for as our backend calls it for folded sequences.
    """
    version = flash_attn.get_flash_attn_version() or 2
    if splits is None:
        most = AttentionConfig.flash_attn_max_num_splits_for_cuda_graph
        splits = folded_splits(len(s.lens), version, most) if s.keys.shape[2] == 1 else 0
    flash_attn.flash_attn_varlen_func(
        q=s.query, k=s.keys, v=s.values, out=s.output, cu_seqlens_q=s.starts, max_seqlen_q=1,
        seqused_k=s.lens, max_seqlen_k=s.tables.shape[1] * PAGE, softmax_scale=DIM**-0.5,
        causal=True, block_table=s.tables, fa_version=version, num_splits=splits,
    )  # fmt: skip


def triton_unified(s: Sequences, most: int | None = None) -> None:
    """Attend with vLLM's kernel in Triton.

    Args:
        most: sequences up to which each is split; None for as our backend calls it.
    """
    count, segments = s.query.shape[0], triton_attn.NUM_PAR_SOFTMAX_SEGMENTS
    if most is None:
        most = triton_attn.MIN_LAUNCH_GRID_SIZE_2D // s.keys.shape[2]
    shape = (min(most, count), s.query.shape[1], segments)
    sizes = ((*shape, DIM), shape, shape)
    outputs, maxima, sums = (torch.empty(size, device=s.query.device) for size in sizes)
    triton_attn.unified_attention(
        q=s.query, k=s.keys, v=s.values, out=s.output, cu_seqlens_q=s.starts, max_seqlen_q=1,
        seqused_k=s.lens, max_seqlen_k=s.tables.shape[1] * PAGE, softmax_scale=DIM**-0.5,
        causal=True, window_size=(-1, -1), block_table=s.tables, softcap=0.0,
        q_descale=None, k_descale=None, v_descale=None,
        seq_threshold_3D=most, num_par_softmax_segments=segments, softmax_segm_output=outputs,
        softmax_segm_max=maxima, softmax_segm_expsum=sums,
    )  # fmt: skip


def sequences(lens: Tensor, heads: int) -> Sequences:
    """Return sequences with pages in random order, as in memory that has been in use."""
    device, count = lens.device, lens.numel()
    width = -(-int(lens.max()) // PAGE)
    needed = -(-lens.long() // PAGE)
    pages = int(needed.sum())
    pool = torch.randn((pages, PAGE, heads, 2 * DIM), device=device, dtype=DTYPE)
    tables = torch.zeros((count, width), dtype=torch.int32, device=device)
    owned = torch.arange(width, device=device) < needed[:, None]
    tables[owned] = torch.randperm(pages, device=device).int()
    query = torch.randn((count, heads * GROUP, DIM), device=device, dtype=DTYPE)
    starts = torch.arange(count + 1, dtype=torch.int32, device=device)
    return Sequences(
        query, pool[..., :DIM], pool[..., DIM:], torch.empty_like(query), starts, lens, tables
    )


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
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("attention_bench: needs a CUDA GPU, and there is none", file=sys.stderr)
        return 2
    if args.sweep:
        rows = sweep(args.requests, args.entries)
        if args.json:
            args.json.write_text(json.dumps({"sweep": rows}, indent=2) + "\n")
        return 0
    limits = ceilings()
    print(f"{torch.cuda.get_device_name()}: copies {limits.bytes_per_s / 1e12:.2f} TB/s")
    rows = report(limits, args.requests, args.entries)
    if args.json:
        args.json.write_text(json.dumps({**limits._asdict(), "attention": rows}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
