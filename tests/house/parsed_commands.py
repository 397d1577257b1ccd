"""Parse command lines as our programs would, without running them.

`python -m tests.house.parsed_commands < COMMANDS`: a JSON list of lists, each a module and its
arguments. The answer maps the commands that a program refuses to what it says. What a program
imports takes seconds: one process parses them all.
"""

import argparse
import contextlib
import importlib
import io
import json
import sys
from typing import Any

_parse_args = argparse.ArgumentParser.parse_args


class _Parsed(BaseException):
    """The program has accepted its arguments. No `except` of its own catches this."""


def _parse_and_stop(self: argparse.ArgumentParser, *args: Any, **options: Any) -> None:
    _parse_args(self, *args, **options)
    raise _Parsed


def _run(module: str, arguments: list[str]) -> None:
    if module == "locust":
        from locust.argument_parser import get_parser

        # They bring options of their own.
        for file in arguments[arguments.index("-f") + 1].split(","):
            importlib.import_module(file.removesuffix(".py").replace("/", "."))
        get_parser().parse_args(arguments)
        raise _Parsed
    sys.argv = [module, *arguments]
    importlib.import_module(module).main()


def refusal(module: str, arguments: list[str]) -> str | None:
    """Return why a program refuses arguments; None if it takes them."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            _run(module, arguments)
    except _Parsed:
        return None
    except SystemExit:
        return said.getvalue().strip() or "ended before it parsed its arguments"
    return "has not parsed its arguments"


def main() -> int:
    argparse.ArgumentParser.parse_args = _parse_and_stop  # type: ignore[assignment]
    commands = json.load(sys.stdin)
    said = {" ".join(one): refusal(one[0], one[1:]) for one in commands}
    json.dump({command: why for command, why in said.items() if why}, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
