"""The published set-up at its smallest."""

import json
from pathlib import Path

import pytest

from adakv_serve.loadtest.engines.published_arms import Load, Setup, compression_of
from adakv_serve.loadtest.published import compare, main


def test_a_64th_is_bounded_while_decoding() -> None:
    setup = Setup("model", {}, "kv_compress", Load(256, 6000, 500), 0, 1)
    assert compression_of("64th", setup) == {
        "policy": "kv_compress", "budget_tokens": 94, "keep_ratio": 0.0, "decode_budget_tokens": 94,
    }  # fmt: skip
    assert compression_of("stock-int4", setup) is None


@pytest.mark.parametrize("bits", ["fp8", "int8", "int4"])
@pytest.mark.parametrize("arm", ["half", "quarter", "64th"])
def test_an_arm_of_fewer_bits_keeps_as_many_entries(arm: str, bits: str) -> None:
    setup = Setup("model", {}, "kv_compress", Load(256, 6000, 500), 0, 1)
    as_wide = compression_of(arm, setup)
    assert as_wide is not None
    assert compression_of(f"{arm}-{bits}", setup) == {**as_wide, "page_dtype": bits}


def test_the_bound_is_of_stocks_prefills_and_of_both_ways_of_decoding() -> None:
    stock = {
        "elapsed_s": 10.0, "prefill_s": 4.0, "tokens_per_s": 100.0, "decode_tokens_per_s": 200.0,
        "output_tokens": 1000,
    }  # fmt: skip
    ours = {"tokens_per_s": 150.0, "decode_tokens_per_s": 600.0, "output_tokens": 1000}
    row = compare(ours, stock)
    assert row["bound"] == pytest.approx(10 / (4 + 6 / 3))
    assert row["ratio"] == 1.5
    assert row["share_of_bound"] == pytest.approx(0.9)
    assert row["output_tokens_equal"]


@pytest.mark.slow
def test_it_runs(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    figures = tmp_path / "figures.json"
    command = [
        "--shape", "tiny", "--kv-gib", "0.002", "--beside-mib", "0.25", "--requests", "6",
        "--prompt-tokens", "400", "--output-tokens", "40", "--arms", "64th", "--json", str(figures),
        "--at-once", "2", "--profile", "2",
    ]  # fmt: skip
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert printed.index("S_max") < printed.index("stock  ") < printed.index("64th  ")
    (arms,) = json.loads(figures.read_text()).values()
    assert arms["stock"]["s_max"] > 1
    assert arms["64th"]["output_tokens_equal"]
    assert arms["64th"]["output_tokens"] == 6 * 40
    assert 0 < arms["64th"]["beside_bytes"] < 1 << 18
    assert arms["64th"]["peak_running"] > arms["stock"]["peak_running"]
    for arm in arms.values():
        assert arm["profiles"]["2"]["step_s"] > 0
        assert any("execute_model" in name for name in arm["profiles"]["2"]["host"])
        assert arm["profiles"]["prompt"]["step_s"] > 0


def test_bad_arguments_are_a_line(capsys: pytest.CaptureFixture) -> None:
    assert main(["--engine", "{nonsense"]) == 2
    assert "--engine: Expecting" in capsys.readouterr().err
