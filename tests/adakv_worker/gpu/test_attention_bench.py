"""That the comparison compares what can run, at equal bytes."""

import pytest
import torch

from adakv_worker import attention_bench
from tests.adakv_worker.gpu.interpreted import flash_attention


def test_both_kernels_attend_to_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    def once(call, *, graph=False):
        call()
        return 1.0

    monkeypatch.setattr(attention_bench, "seconds", once)
    monkeypatch.setattr(attention_bench, "DTYPE", torch.float32)
    for attend in (attention_bench.flash, attention_bench.triton_unified):
        row = attention_bench.measure(attend, requests=2, mean=40, device="cpu")
        assert row["kv_bytes"] == 2 * 2 * 40 * 8 * 128 * 4
        assert row["folded_kv_bytes"] == pytest.approx(row["kv_bytes"], rel=0.05)
        assert row["ratio_at_equal_bytes"] == row["kv_bytes"] / row["folded_kv_bytes"]


def test_the_kernels_agree_on_skewed_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_bench, "DTYPE", torch.float32)
    torch.manual_seed(0)
    folded = attention_bench.sequences(attention_bench.skewed(1, 30, "cpu"), 1)
    attention_bench.triton_unified(folded)
    expected = torch.empty_like(folded.output)
    flash_attention(
        folded.query, folded.keys, folded.values, expected, folded.starts, 1, folded.lens,
        folded.tables.shape[1] * 16, 128**-0.5, True, folded.tables,
    )  # fmt: skip
    torch.testing.assert_close(folded.output, expected, atol=1e-4, rtol=1e-4)
