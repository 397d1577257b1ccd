"""Quality at equal bytes: points, fronts, tables and plots from rows of several formats."""

from pathlib import Path

import pytest

from adakv_serve.evals.commands.bits import COMMAND
from adakv_serve.evals.results import bits
from adakv_serve.evals.results.files import write_rows
from adakv_serve.evals.results.scores import Row

NAME = "small"


def _row(pages: str, policy: str, kept: int, kl: float, task: str = "needles") -> Row:
    sample = {"kept_tokens": kept, "prompt_tokens": 1024}
    return Row(
        task=task, mode="aware", model=NAME + pages, policy=policy, kept=str(kept),
        document_tokens=1024, n=1, clusters=1, kept_tokens=float(kept), exact=None,
        agreement=1 - kl, kl=kl, surprise=None, samples=[sample],
    )  # fmt: skip


ROWS = [
    _row("", "full", 1024, 0.0),
    _row("", "a", 256, 0.5),
    _row("", "a", 256, 0.3, task="recall"),
    _row("", "b", 256, 0.6),
    *(
        _row(pages, "a", kept, kl, task)
        for task in ("needles", "recall")
        for pages, kept, kl in (
            (", fp8 pages", 512, 0.2),
            (", simulated int8 pages", 512, 0.25),
            (", simulated int4 pages", 896, 0.3),
        )
    ),
]


def test_an_entry_has_the_bytes_of_its_numbers_and_of_its_scale() -> None:
    (mine,) = bits.points(ROWS, head_size=64).values()
    shares = {(point.format, point.policy): point.share for point in mine}
    assert shares == {
        ("16 bits", "a"): 1 / 4,
        ("16 bits", "b"): 1 / 4,
        ("fp8", "a"): 1 / 4,
        ("int8", "a"): 1 / 2 * 68 / 128,
        ("int4", "a"): 7 / 8 * 36 / 128,
    }


def test_the_front_has_each_formats_best_policy_over_all_tasks() -> None:
    (mine,) = bits.points(ROWS, head_size=64).values()
    best = bits.front(mine, 1 / 4)
    assert {name: (point.policy, point.kl) for name, point in best.items()} == {
        "16 bits": ("a", 0.4), "fp8": ("a", 0.2), "int8": ("a", 0.25), "int4": ("a", 0.3),
    }  # fmt: skip
    assert bits.front(mine, 1 / 16) == {}


def test_formats_are_compared_by_the_tasks_of_all() -> None:
    (mine,) = bits.points([*ROWS, _row(", fp8 pages", "a", 512, 9.0, task="code")], 64).values()
    assert {point.kl for point in mine if point.format == "fp8"} == {0.2}


def test_pages_of_an_unknown_format_are_refused() -> None:
    with pytest.raises(ValueError, match="small, int2 pages: pages of an unknown format"):
        bits.points([_row(", int2 pages", "a", 1, 0.1)], 64)


def test_the_command_prints_a_table_and_draws(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import argparse

    results, plot = tmp_path / "rows.jsonl", tmp_path / "front.svg"
    list(write_rows([ROWS], results))
    parser = argparse.ArgumentParser()
    COMMAND.add_options(parser)
    assert COMMAND.run(parser.parse_args([str(results), "--plot", str(plot)])) == 0
    printed = capsys.readouterr().out
    assert "| fp8 |  | **a 512: 0.800 / 0.200** |  |  |" in printed
    assert "| 16 bits |  | a 256: 0.600 / 0.400 |  |  |" in printed
    assert plot.stat().st_size
