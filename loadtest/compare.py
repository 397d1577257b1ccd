"""`python -m loadtest.compare configs/compare/laptop.yaml`: arms side by side at equal KV memory.

Each repetition starts every arm's deployment anew, puts all loads on it with Locust and stops it.
The output folder has the report and everything it was made from. The same command continues an
interrupted comparison.
"""

import argparse
import functools
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path

import yaml
from pydantic import ValidationError

from adakv_serve.loadtest.comparison.config import CompareConfig
from adakv_serve.loadtest.comparison.order import Unit
from adakv_serve.loadtest.comparison.report import write_report
from adakv_serve.loadtest.comparison.runs import Runs, units

_FROZEN = "config.yaml"


def compare(path: Path, folder: Path, command: list[str]) -> int:
    """Run the rest of a comparison; return how many of its units crashed in all.

    Raises:
        ValueError: the folder belongs to another configuration.
    """
    config = CompareConfig.read(path)
    _claim(folder, config)
    runs, every = Runs(folder, config), units(config)
    crashes = 0
    for number, unit in enumerate(every, start=1):
        label = f"[{number}/{len(every)}] repetition {unit.repetition + 1}, {unit.arm}"
        if runs.is_done(unit):
            print(f"{label}: done before", flush=True)
        else:
            print(f"{label}: starting", flush=True)
            began = time.monotonic()
            crashed = runs.run(unit, functools.partial(_print_line, label))
            print(f"{label}: {_outcome(runs, unit, crashed)}, {time.monotonic() - began:.0f} s")
        crashes += runs.read(unit).crashed is not None
        write_report(config, runs, folder, command)
    print(f"report: {folder / 'report.html'}")
    return crashes


def _print_line(unit: str, line: str) -> None:
    print(f"{unit}: {line}", flush=True)


def _outcome(runs: Runs, unit: Unit, crashed: str | None) -> str:
    if crashed is not None:
        return f"CRASHED ({crashed.strip().splitlines()[-1]})"
    counts = [len(run.records) for run in runs.read(unit).loads.values()]
    return f"{sum(counts)} requests"


def _claim(folder: Path, config: CompareConfig) -> None:
    """Write the configuration into the folder, and refuse one with runs of another."""
    folder.mkdir(parents=True, exist_ok=True)
    frozen, mine = folder / _FROZEN, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    if frozen.exists() and frozen.read_text() != mine:
        raise ValueError(f"{folder} holds runs of another configuration: give another --out")
    frozen.write_text(mine)


def _in_a_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        details = error.errors()
        return "; ".join(f"{'.'.join(map(str, d['loc']))}: {d['msg']}" for d in details)
    return " ".join(str(error).split())


def main(
    argv: list[str] | None = None, run: Callable[[Path, Path, list[str]], int] = compare
) -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtest.compare", description=__doc__)
    parser.add_argument("configs", type=Path, nargs="+", help="comparisons, such as those shipped")
    parser.add_argument("--out", type=Path, default=Path("results"), help="a folder for each in it")
    args = parser.parse_args(argv)
    command = ["adakv", "bench", "compare", *map(shlex.quote, argv or sys.argv[1:])]
    crashes = 0
    for path in args.configs:
        try:
            crashes += run(path, args.out / path.stem, command)
        except (ValueError, yaml.YAMLError, OSError) as error:
            print(f"loadtest.compare: {path}: {_in_a_line(error)}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print(
                f"\nloadtest.compare: {path}: interrupted; the same command goes on from here",
                file=sys.stderr,
            )
            return 130
    return 1 if crashes else 0


if __name__ == "__main__":
    sys.exit(main())
