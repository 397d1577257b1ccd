"""The report of a comparison: one page as Markdown, and as HTML with its pictures in one file."""

import base64
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

_TEMPLATES = Path(__file__).parent / "templates"
# Columns with two digits after the point; other counts are rounded.
_FINE = ("tokens_per_s", "bound", "good_share", "blocks_per_request")


@dataclass(frozen=True)
class Section:
    """One load. rows: an object for each arm, with a value or None for each column."""

    name: str
    rows: list[dict[str, Any]]
    output_tokens_equal: bool
    remarks: list[str]
    plots: list[str]


@dataclass(frozen=True)
class Page:
    """What the templates show.

    columns: titles by the rows' keys.
    reference: the arm that ratios are taken against.
    environments: more than one where something changed between the parts of a comparison.
    plots of the sections: names of PNG files in the page's folder.
    """

    kv_bytes: int
    repetitions: int
    reference: str
    complete: bool
    columns: dict[str, str]
    sections: list[Section]
    environments: list[dict[str, Any]]
    command: list[str]

    def cells(self, section: Section) -> list[list[str]]:
        """Return the text of a section's table, row by row."""
        return [[_cell(row, column) for column in self.columns] for row in section.rows]


def write_page(page: Page, folder: Path) -> None:
    """Write `report.md` and `report.html` into the folder, which has the pictures."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES), trim_blocks=True, lstrip_blocks=True,
        autoescape=lambda name: name is not None and ".html" in name,
    )  # fmt: skip
    environment.filters["embedded"] = _embedded
    for name in ("report.md", "report.html"):
        text = environment.get_template(f"{name}.jinja").render(page=page, folder=folder)
        (folder / name).write_text(text)


def _cell(row: dict[str, Any], column: str) -> str:
    value = row.get(column)
    if value is None:
        return "-"
    if column == "ratio_to_stock":
        low, high = row["ratio_range"]
        return f"{value:.2f} [{low:.2f}, {high:.2f}]"
    if column.endswith("_s") and column != "tokens_per_s":
        return f"{value:.2f} s" if value >= 1 else f"{value * 1000:.0f} ms"
    if isinstance(value, float):
        return f"{value:.2f}" if column in _FINE else f"{value:.0f}"
    return str(value)


def _embedded(name: str, folder: Path) -> str:
    """Return a picture as a data URL."""
    return "data:image/png;base64," + base64.b64encode((folder / name).read_bytes()).decode()
