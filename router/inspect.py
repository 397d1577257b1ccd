"""`python -m router.inspect`: the live occupancy table, as replicas report it."""

import argparse
import json
import os
import sys

import redis

from router import DEFAULT_APPLICATION, DEFAULT_KEY_PREFIX, DEFAULT_STORE_URL
from router.redis_ledger import LedgerKeys, LedgerReader, LedgerView, Report

COLUMNS = (
    "replica", "blocks", "free", "used", "compr", "growth", "running", "waiting", "tok/s", "kept",
    "age",
)  # fmt: skip


def as_json(view: LedgerView) -> str:
    replicas = [
        {
            **report.occupancy.model_dump(exclude={"replica_id", "schema_major", "schema_minor"}),
            "id": report.occupancy.replica_id,
            "age_s": round(report.age_s, 3),
        }
        for report in view.reports
    ]
    return json.dumps({"replicas": replicas, "dropped": view.dropped})


def as_table(view: LedgerView) -> str:
    if not view.reports:
        return "no replica has reported in the last 2 seconds"
    rows = [COLUMNS, *(_row(report) for report in view.reports)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    lines = [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
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
        str(occupancy.running),
        str(occupancy.waiting),
        f"{occupancy.decode_tokens_per_s:.1f}",
        f"{occupancy.achieved_compression:.0%}",
        f"{report.age_s:.1f}s",
    )


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m router.inspect", description=__doc__)
    parser.add_argument(
        "--url",
        default=os.environ.get("ADAKV_STORE_URL", DEFAULT_STORE_URL),
        help="the store (default: $ADAKV_STORE_URL, else %(default)s)",
    )
    parser.add_argument("--app", default=DEFAULT_APPLICATION, help="Serve application name")
    parser.add_argument("--key-prefix", default=DEFAULT_KEY_PREFIX, help="store.key_prefix")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = _parse(argv)
    try:
        reader = LedgerReader(args.url, LedgerKeys(args.key_prefix, args.app))
        view = reader.read()
    except (redis.RedisError, ValueError) as error:
        # The URL may carry a password: name only what went wrong.
        print(f"router.inspect: cannot read the store: {error}", file=sys.stderr)
        return 1
    print(as_json(view) if args.json else as_table(view))
    return 0


if __name__ == "__main__":
    sys.exit(main())
