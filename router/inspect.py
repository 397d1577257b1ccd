"""`python -m router.inspect`: the live occupancy table."""

import argparse
import contextlib
import json
import os
import sys
import time

import redis

from adakv_serve.router import (
    DEFAULT_APPLICATION,
    DEFAULT_KEY_PREFIX,
    DEFAULT_STORE_PORT,
    DEFAULT_STORE_URL,
)
from adakv_serve.router.ledger.occupancy import Occupancy, Report
from adakv_serve.router.ledger.redis_ledger import LedgerKeys, LedgerReader, LedgerView
from adakv_serve.router.stores import checked_url, full_url

COLUMNS = (
    "replica", "blocks", "free", "used", "compr", "growth", "held", "lent", "borrowed", "running",
    "waiting", "tok/s", "kept", "age",
)  # fmt: skip
BAR_WIDTH = 32
LEGEND = "# compressed  = uncompressed  + growth to come  . free"
CLEAR = "\x1b[H\x1b[2J"


def as_json(view: LedgerView) -> str:
    replicas = [
        {
            **report.occupancy.model_dump(exclude={"replica_id", "schema_major", "schema_minor"}),
            "id": report.occupancy.replica_id,
            "age_s": round(report.age_s, 3),
        }
        for report in view.reports
    ]
    return json.dumps(
        {"replicas": replicas, "dropped": view.dropped, "store_keys": view.store_keys}
    )


def as_table(view: LedgerView, *, bars: bool = False) -> str:
    if not view.reports:
        return "no replica has reported in the last 2 seconds"
    rows = [COLUMNS, *(_row(report) for report in view.reports)]
    if bars:
        pictures = ["", *(_bar(report.occupancy) for report in view.reports)]
        rows = [(*row, picture) for row, picture in zip(rows, pictures, strict=True)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    if bars:
        lines.append(LEGEND)
    if view.dropped:
        lines.append(f"{view.dropped} unreadable reports dropped")
    return "\n".join(lines)


def _row(report: Report) -> tuple[str, ...]:
    occupancy = report.occupancy
    used = 1 - occupancy.blocks_free / occupancy.blocks_total if occupancy.blocks_total else 0.0
    return (
        occupancy.replica_id,
        str(occupancy.blocks_total),
        str(occupancy.blocks_free),
        f"{used:.0%}",
        str(occupancy.blocks_compressed),
        str(occupancy.blocks_reserved_growth),
        str(occupancy.blocks_held),
        str(occupancy.blocks_lent),
        str(occupancy.blocks_borrowed),
        str(occupancy.running),
        str(occupancy.waiting),
        f"{occupancy.decode_tokens_per_s:.1f}",
        f"{occupancy.achieved_compression:.0%}",
        f"{report.age_s:.1f}s",
    )


def _bar(occupancy: Occupancy) -> str:
    """Draw the replica's blocks: compressed, uncompressed, growth to come, free."""
    total = max(occupancy.blocks_total, 1)
    parts = (
        ("#", occupancy.blocks_compressed),
        ("=", occupancy.blocks_uncompressed),
        ("+", occupancy.blocks_reserved_growth),
    )
    bar, held = "", 0
    for sign, blocks in parts:
        held += blocks
        # Rounding the running sum keeps the bar within its width.
        bar += sign * (min(round(BAR_WIDTH * held / total), BAR_WIDTH) - len(bar))
    return bar.ljust(BAR_WIDTH, ".")


def watch(
    reader: LedgerReader, interval_s: float, draws: int | None, *, json_lines: bool = False
) -> None:
    """Redraw the table until interrupted, or `draws` times; show a lost store and go on.

    With `json_lines` print one object per line instead, and nothing while the store is lost.
    """
    drawn = 0
    while True:
        try:
            view = reader.read()
            shown = as_json(view) if json_lines else f"{CLEAR}{as_table(view, bars=True)}"
        except redis.RedisError as error:
            shown = "" if json_lines else f"{CLEAR}cannot read the store: {error}"
        if shown:
            print(shown, flush=True)
        drawn += 1
        if drawn == draws:
            return
        time.sleep(interval_s)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m router.inspect", description=__doc__)
    parser.add_argument(
        "--url",
        default=os.environ.get("ADAKV_STORE_URL", DEFAULT_STORE_URL),
        help="the store; without it $ADAKV_STORE_URL, else the embedded one at port "
        f"{DEFAULT_STORE_PORT}. The password of an embedded store of this machine and user is "
        "found by itself",
    )
    parser.add_argument("--app", default=DEFAULT_APPLICATION, help="Serve application name")
    parser.add_argument("--key-prefix", default=DEFAULT_KEY_PREFIX, help="store.key_prefix")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--watch", action="store_true", help="redraw the table, with bars; an object a line of JSON"
    )
    parser.add_argument("--interval", type=float, default=0.5, help="seconds between two draws")
    parser.add_argument("--draws", type=int, help="end after so many draws")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = _parse(argv)
    try:
        url = full_url(checked_url(args.url, "--url"))
        reader = LedgerReader(url, LedgerKeys(args.key_prefix, args.app))
        if args.watch:
            with contextlib.suppress(KeyboardInterrupt):
                watch(reader, args.interval, args.draws, json_lines=args.json)
            return 0
        view = reader.read()
    except redis.AuthenticationError:
        problem = "it asks for a password: put its whole URL into ADAKV_STORE_URL"
        print(f"router.inspect: cannot read the store: {problem}", file=sys.stderr)
        return 1
    except (redis.RedisError, ValueError) as error:
        print(f"router.inspect: cannot read the store: {error}", file=sys.stderr)
        return 1
    print(as_json(view) if args.json else as_table(view))
    return 0


if __name__ == "__main__":
    sys.exit(main())
