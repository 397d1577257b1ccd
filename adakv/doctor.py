"""`adakv doctor [CONFIG]`: check this machine, and a configuration's ports and store.

It starts nothing and changes nothing. It ends with 1 where something keeps the server from running.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import yaml

from adakv.findings import PACKAGES, PROGRAMS, Finding, of_machine
from adakv.machine import look


def of_config(config: object) -> Iterator[Finding]:
    """Yield findings about a configuration, or that packages which it needs are not usable."""
    try:
        # These packages are what may be missing or broken here.
        from adakv import configured

        yield from configured.of_config(config)
    except Exception as error:
        fact = f"not looked at: {type(error).__name__}"
        if isinstance(error, ImportError) and error.name is not None:
            fact = f"not looked at: {error.name} cannot be imported"
        yield Finding("configuration", "error", fact, "mend the packages above first")


def _as_lines(findings: list[Finding]) -> Iterator[str]:
    width = max(len(one.name) for one in findings)
    for one in findings:
        yield f"{one.verdict:7}  {one.name:{width}}  {one.fact}"
        if one.advice:
            yield f"{'':7}  {'':{width}}  -> {one.advice}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path, nargs="?", help="a configuration of `serve run`")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    args = parser.parse_args()
    findings = list(of_machine(look(PACKAGES, PROGRAMS)))
    if args.config is not None:
        try:
            config = yaml.safe_load(args.config.read_text())
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            parser.error(f"{args.config}: {error}")
        findings += of_config(config)
    if args.json:
        print(json.dumps([one._asdict() for one in findings], indent=2))
    else:
        print("\n".join(_as_lines(findings)))
    return 1 if any(one.verdict == "error" for one in findings) else 0


if __name__ == "__main__":
    sys.exit(main())
