"""`adakv doctor [CONFIG]`: check this machine, and a configuration's ports and store.

It starts nothing and changes nothing. It ends with 1 where something keeps the server from running.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml
from pydantic import ValidationError

from adakv.findings import PACKAGES, PROGRAMS, Finding, of_machine, of_ports
from adakv.machine import look
from adakv_serve.router import DEFAULT_APPLICATION
from adakv_serve.router.ledger.redis_ledger import LedgerKeys, LedgerReader
from adakv_serve.serving.config import AppConfig
from adakv_serve.serving.serve_file import ServeFile
from adakv_serve.serving.store import store_url


def of_config(config: object) -> Iterator[Finding]:
    """Yield findings about a configuration of `serve run` on this machine."""
    try:
        file = ServeFile.of(config)
    except ValidationError as error:
        yield _malformed(error)
        return
    ports = [("http", file.host, file.port)]
    for name, args in file.applications:
        try:
            app = AppConfig.model_validate(args)
        except ValidationError as error:
            yield _malformed(error)
            continue
        yield Finding("configuration", "ok", name)
        if app.store.url is None and app.store.url_env is None:
            ports.append(("embedded store", "127.0.0.1", app.store.port))
        else:
            yield _store(app)
    yield from of_ports(ports)


def _malformed(error: ValidationError) -> Finding:
    # Its text would repeat what was given, which may be a secret.
    places = sorted({_place(one["type"], one["loc"]) for one in error.errors()})
    named = ", ".join(places)
    return Finding("configuration", "error", named, "see `adakv serve` for why")


def _place(kind: str, place: Sequence[object]) -> str:
    if place:
        return ".".join(map(str, place))
    # A validator of several settings names no place.
    return "no mapping" if kind.endswith("_type") else "settings that contradict each other"


def _store(app: AppConfig) -> Finding:
    """Return whether a configuration's store answers; nothing of its URL, which may be secret."""
    try:
        keys = LedgerKeys(app.store.key_prefix, DEFAULT_APPLICATION)
        LedgerReader(store_url(app.store), keys).read()
    except Exception as error:
        return Finding(
            "store", "error", type(error).__name__, "the store does not answer from here"
        )
    return Finding("store", "ok", "answers")


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
            findings += of_config(yaml.safe_load(args.config.read_text()))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            parser.error(f"{args.config}: {error}")
    if args.json:
        print(json.dumps([one._asdict() for one in findings], indent=2))
    else:
        print("\n".join(_as_lines(findings)))
    return 1 if any(one.verdict == "error" for one in findings) else 0


if __name__ == "__main__":
    sys.exit(main())
