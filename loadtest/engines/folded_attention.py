"""The attention kernel with KV heads folded into the batch, against the same kernel unfolded."""

import statistics
import time
from collections.abc import Callable

import torch

REQUESTS, KV_HEADS, GROUP, DIM, PAGE, LENGTH = 8, 3, 3, 64, 32, 512


def folded_over_dense(rounds: int = 30) -> float:
    """Return the time of folded attention over dense attention at equal lengths, on one thread."""
    torch.set_num_threads(1)
    pages = REQUESTS * KV_HEADS * LENGTH // PAGE
    blocks = pages // KV_HEADS
    pool = torch.randn((blocks, KV_HEADS, 2 * PAGE, DIM))
    query = torch.randn((REQUESTS, KV_HEADS * GROUP, DIM))
    table = torch.randperm(blocks, dtype=torch.int32).view(REQUESTS, -1)
    dense = _attention(query, pool, table)
    heads = torch.arange(KV_HEADS, dtype=torch.int32)[:, None]
    folded = _attention(
        query.view(-1, GROUP, DIM),
        pool.view(pages, 1, 2 * PAGE, DIM),
        (table[:, None] * KV_HEADS + heads).view(REQUESTS * KV_HEADS, -1),
    )
    assert torch.allclose(dense().view(-1), folded().view(-1), atol=1e-5)
    ratios = [_seconds(folded) / _seconds(dense) for _ in range(rounds)]
    return statistics.median(ratios)


def _attention(
    query: torch.Tensor, pool: torch.Tensor, table: torch.Tensor
) -> Callable[[], torch.Tensor]:
    from vllm import _custom_ops as ops

    sequences, heads, dim = query.shape
    keys, values = pool.chunk(2, dim=2)
    lens = torch.full((sequences,), LENGTH, dtype=torch.int32)
    starts = torch.arange(sequences + 1, dtype=torch.int32)
    output = torch.empty_like(query)
    plan = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=sequences, num_heads=heads, num_kv_heads=pool.shape[1], head_dim=dim,
        seq_lens=lens, dtype=query.dtype, query_start_loc=starts, causal=True,
        sliding_window_size=-1, isa="vec", enable_kv_split=True,
    )  # fmt: skip

    def attend() -> torch.Tensor:
        ops.cpu_attention_with_kv_cache(
            query=query, key_cache=keys, value_cache=values, output=output,
            query_start_loc=starts, seq_lens=lens, scale=dim**-0.5, causal=True,
            alibi_slopes=None, sliding_window=-1, block_table=table, softcap=0.0,
            scheduler_metadata=plan, s_aux=None,
        )  # fmt: skip
        return output

    return attend


def _seconds(call: Callable[[], torch.Tensor]) -> float:
    started = time.perf_counter()
    for _ in range(20):
        call()
    return time.perf_counter() - started
