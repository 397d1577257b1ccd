"""A comparison's report: `results.json`, `report.md`, `report.html` and their plots."""

import json
from pathlib import Path
from typing import Any

from adakv_serve.loadtest.comparison.config import CompareConfig
from adakv_serve.loadtest.comparison.figures import arm_figures, output_tokens_equal
from adakv_serve.loadtest.comparison.page import Page, Section, write_page
from adakv_serve.loadtest.comparison.plots import draw
from adakv_serve.loadtest.comparison.runs import Runs, units

_COLUMNS = {
    "name": "arm", "tokens_per_s": "tokens/s", "ratio_to_stock": "ratio", "bound": "bound",
    "ttft_p50_s": "TTFT p50", "ttft_p95_s": "TTFT p95", "tpot_p50_s": "TPOT p50",
    "tpot_p95_s": "TPOT p95", "itl_p95_s": "ITL p95", "e2e_p95_s": "E2E p95",
    "good_share": "good", "peak_running": "running", "preemptions": "preempted",
    "prefix_hit_tokens": "prefix hits", "failures": "failed",
}  # fmt: skip


def write_report(config: CompareConfig, runs: Runs, folder: Path, command: list[str]) -> None:
    """Write the report of all runs so far, over an earlier one."""
    every = units(config)
    done = {unit: runs.read(unit) for unit in every if runs.is_done(unit)}
    rows = arm_figures(config, done)
    complete = len(done) == len(every)
    equal = {load.name: output_tokens_equal(rows, load.name) for load in config.loads}
    environments = _distinct([run.environment for run in done.values()])
    results = {
        "arms": rows,
        "output_tokens_equal": equal,
        "complete": complete,
        "config": config.model_dump(mode="json"),
        "command": command,
        "environments": environments,
    }
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    plots = draw(config, done, rows, folder)
    sections = []
    for load in config.loads:
        mine = [row for row in rows if row["workload"] == load.name]
        pictures = plots.get(load.name, [])
        sections.append(Section(load.name, mine, equal[load.name], _remarks(mine), pictures))
    page = Page(
        config.kv_cache_memory_bytes, config.repetitions, config.reference, complete, _COLUMNS,
        sections, environments, command,
    )  # fmt: skip
    write_page(page, folder)


def _distinct(environments: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [one for index, one in enumerate(environments) if one not in environments[:index]]


def _remarks(rows: list[dict[str, Any]]) -> list[str]:
    return [
        f"{row['name']}: {remark}"
        for row in rows
        for remark in (*map(_last_line, row.get("crashed", ())), *row["failure_reasons"])
    ]


def _last_line(text: str) -> str:
    return text.strip().splitlines()[-1]
