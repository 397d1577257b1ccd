"""`python -m evals run`, `report` and the rest: docs/quality.md."""

import argparse
import sys

import httpx

from adakv.progress import waiting
from adakv_serve.evals.commands import COMMANDS


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m evals", description=__doc__)
    parsers = parser.add_subparsers(dest="command", required=True)
    for command in COMMANDS:
        command.add_options(parsers.add_parser(command.name, help=command.help))
    args = parser.parse_args(argv)
    (chosen,) = (command for command in COMMANDS if command.name == args.command)
    try:
        if not chosen.is_long:
            return chosen.run(args)
        with waiting(f"eval {chosen.name}"):
            return chosen.run(args)
    except (OSError, ValueError, httpx.HTTPError) as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
