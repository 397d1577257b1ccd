"""Scores, means, intervals over clusters, differences of pairs."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adakv_serve.evals.choice import Choice, Outcome
from adakv_serve.evals.results.plots import draw
from adakv_serve.evals.results.report import report
from adakv_serve.evals.results.scores import Row, difference, interval, row, score
from adakv_serve.evals.samples import Sample, Tokens

TOKENS = Tokens([1, 2, 3], [8, 9], 0)


def scored(policy: str, kls: list[float], clusters: list[str]) -> Row:
    scores = []
    for number, (kl, cluster) in enumerate(zip(kls, clusters, strict=True)):
        sample = Sample("task", f"sample-{number}", cluster, "", (), "")
        outcome = Outcome([8, 9], [0.1, 0.2], [True, True], [kl, kl], 64.0)
        scores.append(score(sample, TOKENS, outcome))
    return row("task", "aware", "model", 400, Choice(policy, tokens=64), scores)


def test_an_answer_is_exact_if_every_predicted_token_is_right() -> None:
    sample = Sample("task", "1", "1", "", (), "")
    exact = Outcome([8, 9], [0.1, 0.3], [True, False], [0.0, 1.0], 64.0)
    found = score(sample, TOKENS, exact)
    assert (found.exact, found.agreement, found.kl) == (True, 0.5, 0.5)
    assert found.surprise == pytest.approx(0.2)
    assert (found.kept_tokens, found.prompt_tokens) == (64.0, 3)
    assert score(sample, TOKENS, Outcome([8, 7], [1, 1], [True, True], [0, 0])).exact is False


def test_a_sample_without_a_right_answer_is_not_exact_and_not_wrong() -> None:
    sample = Sample("task", "1", "1", "", (), "", has_answer=False)
    assert score(sample, TOKENS, Outcome([8, 9])).exact is None


def test_means_leave_out_samples_without_the_figure() -> None:
    samples = [Sample("task", str(number), "document", "", (), "") for number in range(2)]
    outcomes = (Outcome([8, 9], kl=[0.5]), Outcome([8, 9]))
    scores = [score(*one) for one in zip(samples, (TOKENS, TOKENS), outcomes, strict=True)]
    found = row("task", "aware", "model", 400, Choice("snapkv", tokens=64), scores)
    assert (found.n, found.clusters, found.kl) == (2, 1, 0.5)


def test_differences_leave_out_samples_that_only_one_row_has() -> None:
    ours, theirs = scored("one", [1.0, 2.0], ["a", "b"]), scored("other", [0.5, 9.0], ["a", "b"])
    samples = [theirs.samples[0], {**theirs.samples[1], "kl": None}]
    assert difference(ours, replace(theirs, samples=samples), "kl").mean == 0.5
    assert difference(replace(theirs, samples=samples), ours, "kl").mean == -0.5


def test_intervals_resample_clusters() -> None:
    values = list(np.random.default_rng(0).normal(size=120))
    few = interval([str(number % 4) for number in range(120)], values)
    many = interval([str(number) for number in range(120)], values)
    assert few.low < np.mean(values) < few.high
    assert many.low < np.mean(values) < many.high
    same = interval([str(number // 30) for number in range(120)], [1, 2, 3] * 40)
    assert same.low == same.high == 2


def test_an_interval_covers_95_percent_of_the_means() -> None:
    rng = np.random.default_rng(1)
    names = [str(number) for number in range(40)]
    misses = 0
    for _ in range(100):
        found = interval(names, list(rng.normal(size=40)))
        misses += not found.low <= 0 <= found.high
    # Of 100 intervals of 95 % about 5 miss, of 80 % about 20.
    assert misses <= 12


@given(
    kls=st.lists(st.floats(0, 5), min_size=12, max_size=30),
    shift=st.floats(0.1, 2),
)
def test_a_difference_in_every_pair_is_clear(kls: list[float], shift: float) -> None:
    clusters = [str(number // 2) for number in range(len(kls))]
    worse = scored("worse", [kl + shift for kl in kls], clusters)
    found = difference(worse, scored("better", kls, clusters), "kl")
    assert found.mean == pytest.approx(shift, abs=1e-4)
    assert found.is_clear
    assert not difference(worse, worse, "kl").is_clear


def test_rows_of_different_samples_are_not_compared() -> None:
    with pytest.raises(ValueError, match="different samples"):
        difference(scored("one", [1.0], ["a"]), scored("other", [1.0, 2.0], ["a", "b"]), "kl")


def test_a_report_has_a_cell_for_each_policy_and_budget() -> None:
    rows = [scored("snapkv", [0.5, 0.7], ["a", "b"]), scored("ada_snapkv", [0.1, 0.2], ["a", "b"])]
    text = report(rows)
    assert "| snapkv | 1.000 / 1.000 / 0.600 |" in text
    twins = text.split("### KL less even heads'")[1]
    assert "| ada_snapkv | -0.450 [" in twins
    assert "| snapkv | +0.450 [" in report(rows, baseline="ada_snapkv")
    assert "| task | ada_snapkv 0.150 |" in text


def test_a_report_compares_the_samples_that_both_policies_have() -> None:
    rows = [
        scored("snapkv", [0.5, 0.7, 0.9], ["a", "b", "c"]),
        scored("ada_snapkv", [0.1, 0.2], ["a", "b"]),
    ]
    assert "| ada_snapkv | -0.450 [" in report(rows).split("### KL less even heads'")[1]
    # Whatever the order of their tasks.
    others = [replace(one, task="other") for one in rows]
    mixed = report([rows[0], *others, rows[1]])
    assert "| ada_snapkv | -0.450 [" in mixed.split("### KL less even heads'")[1]
    other = replace(rows[1], task="other")
    assert "| snapkv | 1.000 / 1.000 / 0.700 |" in report([rows[0], other])


def test_a_difference_over_few_documents_is_not_clear() -> None:
    sure, unsure = (["a", "b", "c", "d", "e", "f"], ["a", "a", "b", "b", "c", "c"])
    for clusters, clear in ((sure, True), (unsure, False)):
        ours, theirs = scored("one", [0.1] * 6, clusters), scored("other", [0.3] * 6, clusters)
        assert difference(ours, theirs, "kl").is_clear is clear


def test_samples_answered_with_the_full_cache_are_counted() -> None:
    full = row("task", "aware", "model", 400, Choice("snapkv", tokens=64), [
        score(Sample("task", "1", "1", "", (), ""), TOKENS, Outcome(skipped=reason))
        for reason in (None, "within_budget", "full_requested", "no_room")
    ])  # fmt: skip
    assert full.not_compressed == 1
    assert "with the full cache: snapkv 64, task, 1 of 4." in report([full])


def test_a_plot_has_a_line_for_each_policy(tmp_path: Path) -> None:
    rows = [scored("snapkv", [0.5, 0.7], ["a", "b"]), scored("ada_snapkv", [0.1, 0.2], ["a", "b"])]
    path = tmp_path / "fidelity.svg"
    draw(rows, path)
    text = path.read_text()
    assert "<!-- ada_snapkv -->" in text
    assert "<!-- snapkv -->" in text
    with pytest.raises(ValueError, match="no forced answers"):
        draw([replace(row, kl=None) for row in rows], path)
