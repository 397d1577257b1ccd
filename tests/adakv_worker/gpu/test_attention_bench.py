"""The attention bench compares kernels that run, at equal bytes."""

from functools import partial

import pytest
import torch

from adakv_serve.kernels import bench
from adakv_worker import attention_bench
from tests.adakv_worker.gpu.interpreted import flash_attention


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    def once(call, *, graph=False):
        call()
        return 1.0

    monkeypatch.setattr(attention_bench, "seconds", once)
    monkeypatch.setattr(attention_bench, "DTYPE", torch.float32)


@pytest.mark.usefixtures("unmeasured")
def test_both_kernels_attend_to_the_same_bytes() -> None:
    for attend in (attention_bench.flash, attention_bench.triton_unified):
        row = attention_bench.measure(attend, requests=2, mean=40, device="cpu")
        assert row["kv_bytes"] == 2 * 2 * 40 * 8 * 128 * 4
        assert row["folded_kv_bytes"] == pytest.approx(row["kv_bytes"], rel=0.05)
        assert row["ratio_at_equal_bytes"] == row["kv_bytes"] / row["folded_kv_bytes"]


@pytest.mark.usefixtures("unmeasured")
def test_a_sweep_is_of_both_kernels(capsys: pytest.CaptureFixture[str]) -> None:
    rows = attention_bench.sweep([2], [40], device="cpu")
    assert [row["kernel"] for row in rows] == ["flash", "triton_unified"]
    assert all(len(row["seconds"]) > 1 for row in rows)
    assert "triton_unified" in capsys.readouterr().out


@pytest.mark.usefixtures("unmeasured")
def test_pages_of_fewer_bits_have_as_many_entries(capsys: pytest.CaptureFixture[str]) -> None:
    rows = attention_bench.bits([2], [40], device="cpu")
    shares = {row["pages"]: row["bytes_ratio"] for row in rows}
    # 128 numbers of four bytes here, and a scale of four.
    assert shares == {
        "auto": 1, "fp8": 1 / 4, "int8_per_token_head": 132 / 512, "fp8_per_token_head": 132 / 512,
        "int4_per_token_head": 68 / 512,
    }  # fmt: skip
    assert "int4_per_token_head" in capsys.readouterr().out


def test_the_kernels_agree_on_skewed_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_bench, "DTYPE", torch.float32)
    torch.manual_seed(0)
    folded = attention_bench.sequences(attention_bench.skewed(1, 30, "cpu"), 1)
    attention_bench.triton_unified(folded)
    expected = torch.empty_like(folded.output)
    flash_attention(
        folded.query, folded.pages.keys, folded.pages.values, expected, folded.starts, 1,
        folded.lens, folded.room, 128**-0.5, True, folded.tables,
    )  # fmt: skip
    torch.testing.assert_close(folded.output, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("unmeasured")
def test_the_kernels_bench_reports_it_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = partial(attention_bench.report, requests=[2], entries=[40], device="cpu")
    monkeypatch.setattr(attention_bench, "report", small)
    reports = bench.reports_of_others(bench.Ceilings(1e12, 1e15))
    assert [row["kernel"] for row in reports["attention"]] == ["flash", "triton_unified"]
    assert "triton_unified" in capsys.readouterr().out
