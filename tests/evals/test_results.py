"""Results files while they are written."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from evals.gate import RECORDED
from evals.run import finished, read_rows, write_rows
from evals.scores import Row


def parts() -> Iterator[list[Row]]:
    """Two samples of one task, and one of another before the run breaks off."""
    one, other = (replace(read_rows(RECORDED)[0], task=task) for task in ("one", "other"))
    yield [replace(one, n=1)]
    yield [replace(one, n=2)]
    yield [replace(other, n=1)]
    raise KeyboardInterrupt


def test_a_run_that_is_cut_short_keeps_what_it_has(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.jsonl"
    writing = write_rows(parts(), path)
    for expected in ([("one", 1)], [("one", 2)], [("one", 2), ("other", 1)]):
        next(writing)
        assert [(row.task, row.n) for row in read_rows(path)] == expected
    with pytest.raises(KeyboardInterrupt):
        next(writing)
    assert [(row.task, row.n) for row in read_rows(path)] == [("one", 2), ("other", 1)]
    assert list(path.parent.iterdir()) == [path]


def test_of_each_task_the_last_rows_count() -> None:
    first, second = (read_rows(RECORDED)[0] for _ in range(2))
    later = replace(first, n=9)
    other = replace(second, mode="agnostic")
    assert finished([[first], [other], [later]]) == [later, other]


def test_a_file_that_cannot_be_written_is_told_before_anything_is_measured(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        next(write_rows(parts(), tmp_path / "file" / "rows.jsonl"))
