"""Assumptions of our backend about vLLM's CPU attention kernel."""

import pytest
import torch
from torch import Tensor
from vllm import _custom_ops as ops

GROUP, DIM, PAGE = 3, 64, 32


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("longest", [20, 300, 5000])
def test_a_plan_for_longer_sequences_attends_to_the_same(longest: int, threads: int) -> None:
    generator = torch.Generator().manual_seed(longest)
    sequences, width = 21, longest // PAGE + 1
    pool = torch.randn((sequences * width, 1, 2 * PAGE, DIM), generator=generator)
    table = torch.randperm(sequences * width, generator=generator, dtype=torch.int32)
    query = torch.randn((sequences, GROUP, DIM), generator=generator)
    starts = torch.arange(sequences + 1, dtype=torch.int32)
    lens = torch.randint(1, longest + 1, (sequences,), generator=generator, dtype=torch.int32)

    def attend(planned_lens: Tensor) -> Tensor:
        plan = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=sequences, num_heads=GROUP, num_kv_heads=1, head_dim=DIM,
            seq_lens=planned_lens, dtype=query.dtype, query_start_loc=starts, causal=True,
            sliding_window_size=-1, isa="vec", enable_kv_split=True,
        )  # fmt: skip
        output = torch.empty_like(query)
        keys, values = pool.chunk(2, dim=2)
        ops.cpu_attention_with_kv_cache(
            query=query, key_cache=keys, value_cache=values, output=output,
            query_start_loc=starts, seq_lens=lens, scale=DIM**-0.5, causal=True,
            alibi_slopes=None, sliding_window=-1, block_table=table.view(sequences, -1),
            softcap=0.0, scheduler_metadata=plan, s_aux=None,
        )  # fmt: skip
        return output

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        exact = attend(lens)
        torch.testing.assert_close(attend(lens + 31), exact, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(
            attend(torch.full_like(lens, longest)), exact, atol=1e-6, rtol=1e-5
        )
    finally:
        torch.set_num_threads(before)
