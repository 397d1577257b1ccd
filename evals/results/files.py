"""Results files: a line for each task under each choice."""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from adakv_serve.evals.results.scores import Row


def finished(parts: Iterable[Sequence[Row]]) -> list[Row]:
    """Return the last rows of each task and mode."""
    last = {(rows[0].task, rows[0].mode): rows for rows in parts}
    return [row for rows in last.values() for row in rows]


def write_rows(
    parts: Iterable[Sequence[Row]], path: Path, earlier: Iterable[Row] = ()
) -> Iterator[Sequence[Row]]:
    """Write each part as it comes and yield it, so that an interrupted run keeps its results.

    A part replaces the last one of the same task and mode.

    Args:
        earlier: rows that stay until a part replaces them.

    Raises:
        OSError: the file cannot be written; raised before the first part is measured.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    last: dict[tuple[str, str], Sequence[Row]] = {}
    for one in earlier:
        last[one.task, one.mode] = [*last.get((one.task, one.mode), ()), one]
    with path.open("a" if last else "w"):
        part_path = path.with_name(f"{path.name}.part")
    for rows in parts:
        last[rows[0].task, rows[0].mode] = rows
        every = finished(last.values())
        part_path.write_text("".join(json.dumps(one.as_dict()) + "\n" for one in every))
        part_path.replace(path)
        yield rows


def read_rows(path: Path) -> list[Row]:
    """Read a results file.

    Raises:
        OSError: the file cannot be read.
        ValueError: a line is no row.
    """
    try:
        return [Row(**json.loads(line)) for line in path.read_text().splitlines()]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} holds no results: {error}") from error
