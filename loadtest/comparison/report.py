"""A comparison's report: `results.json`, `report.md`, `report.html` and their plots."""

import base64
import json
from pathlib import Path
from typing import Any

import jinja2

from loadtest.comparison.config import CompareConfig
from loadtest.comparison.figures import arm_figures, output_tokens_equal
from loadtest.comparison.plots import draw
from loadtest.comparison.runs import Runs, units

_TEMPLATES = Path(__file__).parent / "templates"
_COLUMNS = {
    "name": "arm", "tokens_per_s": "tokens/s", "ratio_to_stock": "ratio", "bound": "bound",
    "ttft_p50_s": "TTFT p50", "ttft_p95_s": "TTFT p95", "tpot_p50_s": "TPOT p50",
    "tpot_p95_s": "TPOT p95", "itl_p95_s": "ITL p95", "e2e_p95_s": "E2E p95",
    "good_share": "good", "peak_running": "running", "preemptions": "preempted",
    "prefix_hit_tokens": "prefix hits", "failures": "failed",
}  # fmt: skip


def write_report(config: CompareConfig, runs: Runs, folder: Path, command: list[str]) -> None:
    """Writes what there is so far; a comparison that goes on overwrites it."""
    rows = arm_figures(config, runs)
    every = units(config)
    done = [runs.read(unit) for unit in every if runs.is_done(unit)]
    results = {
        "arms": rows,
        "output_tokens_equal": {
            load.name: output_tokens_equal(rows, load.name) for load in config.loads
        },
        "complete": all(runs.is_done(unit) for unit in every),
        "config": config.model_dump(mode="json"),
        "command": command,
        # More than one, where something was changed before the comparison went on.
        "environments": _distinct([run.environment for run in done]),
    }
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    plots = draw(config, runs, rows, folder)
    loads = [_load_section(load.name, results, plots.get(load.name, [])) for load in config.loads]
    page = {"results": results, "loads": loads, "config": config, "columns": _COLUMNS}
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES), trim_blocks=True, lstrip_blocks=True,
        autoescape=lambda name: name is not None and ".html" in name,
    )  # fmt: skip
    environment.filters["embedded"] = _embedded
    for name in ("report.md", "report.html"):
        text = environment.get_template(f"{name}.jinja").render(page, folder=folder)
        (folder / name).write_text(text)


def _distinct(environments: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [one for index, one in enumerate(environments) if one not in environments[:index]]


def _load_section(name: str, results: dict[str, Any], plots: list[str]) -> dict[str, Any]:
    rows = [row for row in results["arms"] if row["workload"] == name]
    return {
        "name": name,
        "cells": [[_cell(row, column) for column in _COLUMNS] for row in rows],
        "equal": results["output_tokens_equal"][name],
        "remarks": [
            f"{row['name']}: {remark}"
            for row in rows
            for remark in (*map(_last_line, row.get("crashed", ())), *row["failure_reasons"])
        ],
        "plots": plots,
    }


def _cell(row: dict[str, Any], column: str) -> str:
    value = row[column]
    if value is None:
        return "-"
    if column == "ratio_to_stock":
        low, high = row["ratio_range"]
        return f"{value:.2f} [{low:.2f}, {high:.2f}]"
    if column.endswith("_s") and column != "tokens_per_s":
        return f"{value:.2f} s" if value >= 1 else f"{value * 1000:.0f} ms"
    if isinstance(value, float):
        fine = column in ("tokens_per_s", "bound", "good_share")
        return f"{value:.2f}" if fine else f"{value:.0f}"
    return str(value)


def _last_line(text: str) -> str:
    return text.strip().splitlines()[-1]


def _embedded(name: str, folder: Path) -> str:
    """A picture as a data URL, so that the page is one file."""
    return "data:image/png;base64," + base64.b64encode((folder / name).read_bytes()).decode()
