"""`python -m evals bits`: compare formats of pages at equal bytes."""

import argparse
from pathlib import Path

from adakv_serve.evals.commands.command import Command
from adakv_serve.evals.results.files import read_rows


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("results", nargs="+", type=Path, help="files of runs with several formats")
    parser.add_argument("--head-size", type=int, default=64, help="numbers of a key of the model")
    parser.add_argument("--plot", type=Path, help="draw KL against bytes, as .svg or .png")


def _run(args: argparse.Namespace) -> int:
    from adakv_serve.evals.results import bits

    rows = [row for path in args.results for row in read_rows(path)]
    print(bits.table(rows, args.head_size))
    if args.plot:
        bits.draw(rows, args.head_size, args.plot)
    return 0


COMMAND = Command(
    "bits", "compare formats of pages at equal bytes", _add_options, _run, is_long=False
)
