"""`python -m evals report`: print tables of results, and draw them."""

import argparse
from pathlib import Path

from adakv_serve.evals.commands.command import Command
from adakv_serve.evals.results.files import read_rows
from adakv_serve.evals.results.report import report


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--plot", type=Path, help="draw fidelity against memory, as .svg or .png")
    parser.add_argument("--baseline", help="a policy to compare the others with")


def _run(args: argparse.Namespace) -> int:
    rows = [row for path in args.results for row in read_rows(path)]
    print(report(rows, args.baseline))
    if args.plot:
        from adakv_serve.evals.results.plots import draw

        draw(rows, args.plot)
    return 0


COMMAND = Command("report", "print tables of results files", _add_options, _run, is_long=False)
