"""Results files: a line for each task under each choice."""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from evals.results.scores import Row


def finished(parts: Iterable[Sequence[Row]]) -> list[Row]:
    """The last rows of each task and mode."""
    last = {(rows[0].task, rows[0].mode): rows for rows in parts}
    return [row for rows in last.values() for row in rows]


def write_rows(
    parts: Iterable[Sequence[Row]], path: Path, earlier: Iterable[Row] = ()
) -> Iterator[Sequence[Row]]:
    """Writes each part as it comes, so that a run that is cut short keeps what it has.

    A part takes the place of the last one of the same task and mode.

    Args:
        earlier: rows that stay where no part takes their place.

    Raises:
        OSError: the file cannot be written; before anything is measured.
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
    """Raises ValueError: the file holds something else. OSError: it is not there."""
    try:
        return [Row(**json.loads(line)) for line in path.read_text().splitlines()]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} holds no results: {error}") from error
