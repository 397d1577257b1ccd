"""The comparison from its configuration to its report, over runs of earlier days."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from adakv_serve.loadtest import compare, offline
from adakv_serve.loadtest.client.records import Record
from adakv_serve.loadtest.comparison.config import CompareConfig
from adakv_serve.loadtest.comparison.order import Unit
from adakv_serve.loadtest.comparison.runs import Runs, units
from adakv_serve.serving.config import AppConfig

ROOT = Path(__file__).parents[2]
LOAD = {
    "name": "qa", "workload": "long-document-qa", "prompt_tokens": 100, "output_tokens": 10,
    "users": 2, "sessions": 2, "limit_ttft_s": 1.5,
}  # fmt: skip
CONFIG: dict[str, Any] = {
    "base": str(ROOT / "configs" / "cluster.yaml"),
    "args": {"engine": {"max_num_seqs": 4}},
    "kv_cache_memory_bytes": 1000,
    "repetitions": 2,
    "arms": {
        "stock": {"args": {"compression": {"enabled": False}}},
        "small": {"args": {"compression": {"budget_tokens": 128}}, "beside_kv_bytes": 100},
    },
    "loads": [LOAD],
}


def write_unit(
    folder: Path,
    unit: str,
    seconds: float,
    crashed: str | None = None,
    python: str = "3.11",
    cached_tokens: int = 0,
) -> None:
    """Write the files of a unit: two requests of 10 tokens for 100 each in `seconds`."""
    path = folder / "runs" / unit
    path.mkdir(parents=True)
    (path / "done.json").write_text(
        json.dumps({"crashed": crashed, "environment": {"python": python}})
    )
    if crashed is not None:
        return
    records = [
        Record(f"qa-{number}", 0, at_s=0.0, ttft_s=number + 1.0, tpot_s=0.1, e2e_s=seconds,
               prompt_tokens=100, cached_tokens=cached_tokens, output_tokens=10)
        for number in range(2)
    ]  # fmt: skip
    (path / "qa.records.jsonl").write_text("".join(record.line() + "\n" for record in records))
    load = {
        "running": 2, "waiting": 0, "prefill_tokens_queued": 0, "preemptions": 3,
        "decode_tokens_per_s": 40 / seconds, "blocks_total": 10, "blocks_free": 4,
    }  # fmt: skip
    looks = [[0.0, [{**load, "running": 0, "preemptions": 1}]], [1.0, [load]]]
    (path / "qa.looks.jsonl").write_text("".join(json.dumps(look) + "\n" for look in looks))
    if unit.endswith("stock"):
        prefill = [
            Record("qa-0", 0, at_s=0.0, ttft_s=1.0, e2e_s=1.0, prompt_tokens=100, output_tokens=1)
        ]
        text = "".join(record.line() + "\n" for record in prefill)
        (path / "qa.prefill.records.jsonl").write_text(text)
        (path / "qa.prefill.looks.jsonl").write_text("")


def run(folder: Path, config: dict[str, Any] = CONFIG) -> tuple[int, Path]:
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return compare.main([str(path), "--out", str(folder / "out")]), folder / "out" / "mine"


def test_the_report_has_medians_ratios_and_the_bound(tmp_path: Path) -> None:
    for unit, seconds in (("0-stock", 8.0), ("0-small", 5.0), ("1-small", 4.0), ("1-stock", 8.0)):
        write_unit(tmp_path / "out" / "mine", unit, seconds)
    code, folder = run(tmp_path)
    assert code == 0
    results = json.loads((folder / "results.json").read_text())
    stock, small = results["arms"]
    assert (stock["name"], stock["workload"], stock["kv_bytes"]) == ("stock", "qa", 1000)
    assert (small["kv_bytes"], small["beside_kv_bytes"]) == (900, 100)
    assert stock["tokens_per_s"] == 2.5
    assert small["ratio_to_stock"] == 1.8
    assert small["ratio_range"] == [1.6, 2.0]
    # Of stock's 8 s two are prefill; decode is 5 tokens/s against 9.
    assert small["bound"] == pytest.approx(8 / (2 + 6 / 1.8), abs=1e-3)
    assert (small["ttft_p50_s"], small["ttft_p95_s"], small["tpot_p95_s"]) == (1.0, 2.0, 0.1)
    assert (small["preemptions"], small["peak_running"], small["peak_occupancy"]) == (2, 2, 0.6)
    assert small["good_share"] == 0.5
    assert (small["output_tokens"], small["failures"]) == (20, 0)
    assert results["output_tokens_equal"] == {"qa": True}
    assert results["complete"]
    assert results["environments"] == [{"python": "3.11"}]
    assert "| small | 4.50 | 1.80 [1.60, 2.00] |" in (folder / "report.md").read_text()
    assert (folder / "report.html").read_text().count("data:image/png;base64,") == 3


def test_the_bound_counts_the_prompts_that_an_arm_computes(tmp_path: Path) -> None:
    config = {**CONFIG, "loads": [{**LOAD, "workload": "chat"}]}
    for unit in ("0-stock", "1-stock"):
        write_unit(tmp_path / "out" / "mine", unit, 8.0)
    for unit in ("0-small", "1-small"):
        write_unit(tmp_path / "out" / "mine", unit, 4.0, cached_tokens=75)
    _, folder = run(tmp_path, config)
    small = json.loads((folder / "results.json").read_text())["arms"][1]
    # Stock computes 200 tokens in two seconds, and this one 50.
    assert (small["prefix_hit_tokens"], small["computed_prompt_tokens"]) == (150, 50)
    assert small["bound"] == pytest.approx(8 / (2 / 4 + 6 / 2), abs=1e-3)


def test_an_arm_that_crashed_is_reported(tmp_path: Path) -> None:
    for unit in ("0-stock", "1-stock"):
        write_unit(tmp_path / "out" / "mine", unit, 8.0)
    for unit in ("0-small", "1-small"):
        write_unit(tmp_path / "out" / "mine", unit, 8.0, crashed="no memory was left")
    code, folder = run(tmp_path)
    assert code == 1
    small = json.loads((folder / "results.json").read_text())["arms"][1]
    assert small["crashed"] == ["no memory was left"] * 2
    assert small["tokens_per_s"] is None
    assert "small: no memory was left" in (folder / "report.md").read_text()


def test_a_comparison_of_mixed_environments_has_a_warning(tmp_path: Path) -> None:
    for unit, python in (("0-stock", "3.11"), ("0-small", "3.11"), ("1-small", "3.12")):
        write_unit(tmp_path / "out" / "mine", unit, 8.0, python=python)
    write_unit(tmp_path / "out" / "mine", "1-stock", 8.0, python="3.12")
    _, folder = run(tmp_path)
    assert "different environments are mixed" in (folder / "report.md").read_text()


def test_arms_take_turns_and_what_is_done_is_not_done_again(tmp_path: Path) -> None:
    config = CompareConfig.model_validate(CONFIG)
    assert [(unit.repetition, unit.arm) for unit in units(config)] == [
        (0, "stock"), (0, "small"), (1, "small"), (1, "stock"),
    ]  # fmt: skip
    write_unit(tmp_path, "0-stock", 8.0)
    runs = Runs(tmp_path, config)
    assert runs.is_done(Unit(0, "stock"))
    assert not runs.is_done(Unit(1, "stock"))


def test_an_arm_is_the_base_with_its_own_laid_over() -> None:
    config = CompareConfig.model_validate(CONFIG)
    (application,) = config.deployment("small")["applications"]
    args = application["args"]
    assert args["engine"]["kv_cache_memory_bytes"] == 900
    assert args["engine"]["max_num_seqs"] == 4
    assert args["engine"]["block_size"] == 32
    assert args["compression"]["budget_tokens"] == 128
    assert args["compression"]["policy"] == "auto"


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "compare").glob("*.yaml")), ids=str)
def test_the_shipped_comparisons_are_valid(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = CompareConfig.read(path)
    for arm in config.arms:
        (application,) = config.deployment(arm)["applications"]
        AppConfig.model_validate(application["args"])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"reference": "other"}, "the reference arm 'other' is not among the arms"),
        ({"loads": [LOAD, LOAD]}, "two loads have the same name"),
        ({"loads": [{**LOAD, "workload": "poetry"}]}, "unknown workload 'poetry'"),
        ({"arms": {"a/b": {}}}, "should match pattern"),
        ({"repetition": 3}, "repetition: Extra inputs are not permitted"),
    ],
)
def test_a_bad_comparison_is_refused_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], reason: str
) -> None:
    code, _ = run(tmp_path, {**CONFIG, **changes})
    assert code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert reason in line


def test_an_interruption_says_how_to_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any) -> int:
        raise KeyboardInterrupt

    assert compare.main(["mine.yaml", "--out", str(tmp_path)], interrupted) == 130
    assert "interrupted; the same command goes on" in capsys.readouterr().err


def test_runs_of_another_comparison_are_not_mixed_in(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for unit in ("0-stock", "0-small", "1-small", "1-stock"):
        write_unit(tmp_path / "out" / "mine", unit, 8.0)
    assert run(tmp_path)[0] == 0
    assert run(tmp_path, {**CONFIG, "kv_cache_memory_bytes": 2000})[0] == 2
    assert "another configuration" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arm", "name"),
    [
        (offline.Arm(), "stock"),
        (offline.Arm(cache_dtype="fp8"), "fp8-stock"),
        (offline.Arm("full"), "off"),
        (offline.Arm(offline.POLICY, 256), "256"),
        (offline.Arm("snapkv", 64, "fp8"), "fp8-snapkv-64"),
        (offline.Arm(offline.POLICY, 256, page_dtype="fp8"), "fp8-pages-256"),
    ],
)
def test_arms_have_names_of_their_own(arm: offline.Arm, name: str) -> None:
    assert arm.name == name


def test_answers_agree_up_to_the_first_token_that_differs() -> None:
    theirs = [[1, 2, 3, 4], [5, 6]]
    assert offline.agreement(theirs, theirs) == 1
    assert offline.agreement([[1, 2, 9, 4], [7, 6]], theirs) == 0.25


def test_the_offline_run_writes_the_same_report(tmp_path: Path) -> None:
    arm = {
        "tokens_per_s": 20.0, "tokens_per_s_range": [19.0, 21.0], "peak_running": 2,
        "blocks_per_request": 50.4, "preemptions": 0, "prefill_s": 30.0, "compress_s": 0.0,
        "decode_s": 55.0, "agreement": 1.0,
    }  # fmt: skip
    mix = {
        "stock": arm, "128": {**arm, "tokens_per_s": 40.0, "tokens_per_s_range": [38.0, 42.0]},
        "output_tokens_equal": True,
        "ratio": {"128": 2.0}, "ratio_range": {"128": [1.9, 2.1]}, "bound": {"128": 2.1},
        "ratio_of_bound": {"128": 0.952}, "extra_bytes": 1000,
    }  # fmt: skip
    offline.write_report({"mixes": {"1500/192": mix}}, 3, tmp_path, ["python"])
    results = json.loads((tmp_path / "results.json").read_text())
    assert [row["ratio_to_stock"] for row in results["arms"]] == [1.0, 2.0]
    assert results["arms"][1]["workload"] == "1500/192"
    text = (tmp_path / "report.md").read_text()
    assert "| 128 | 40.00 | 2.00 [1.90, 2.10] | 2.10 | 2 | 50.40 | 0 | 30.00 s |" in text
    assert (tmp_path / "report.html").read_text().count("data:image/png;base64,") == 1
