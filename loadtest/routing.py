"""`python -m loadtest.routing`: routing by occupancy against Ray Serve's own router, live.

Two clusters of two real replicas run side by side and take turns with the same requests: a few long
prompts among many short ones, at the same moments. While they run, the ledger tells whether
requests waited at one replica while the other had room for them.
"""

import argparse
import asyncio
import json
import math
import random
import statistics
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import yaml

from loadtest.client.sse_client import timed_completion
from loadtest.servers.occupancy import ReplicaLoad, occupancy_watch
from loadtest.servers.ports import free_port
from loadtest.servers.processes import serve_run

ARMS = {"ours": "occupancy", "power_of_two": "power_of_two"}
_SAMPLE_S = 0.2
_SENTENCE = "The harbour master wrote down the weather of the hour and every ship that passed. "
# About 1,600 and 90 tokens.
_LONG, _SHORT = 100, 5


class Store(NamedTuple):
    url: str
    application: str


class Planned(NamedTuple):
    at_s: float
    prompt: str
    output_tokens: int


class Round(NamedTuple):
    """queued_while_room: share of the samples with a waiting request in which it was avoidable."""

    ttft_p50_s: float
    ttft_p99_s: float
    queued_while_room: float
    elapsed_s: float


def plan(requests: int, rate_per_s: float, long_share: float, seed: int) -> list[Planned]:
    """Seeded arrivals; every prompt differs from its first word, so that nothing is cached."""
    rng = random.Random(seed)
    at = 0.0
    planned = []
    for number in range(requests):
        at += rng.expovariate(rate_per_s)
        sentences = _LONG if rng.random() < long_share else _SHORT
        prompt = f"{seed}-{number}-{rng.random()}: " + _SENTENCE * sentences
        planned.append(Planned(at, prompt, rng.randrange(32, 96)))
    return planned


async def run_round(base_url: str, store: Store, planned: list[Planned]) -> Round:
    loop = asyncio.get_running_loop()
    async with (
        httpx.AsyncClient(base_url=base_url, timeout=600) as client,
        occupancy_watch(store.url, store.application, _SAMPLE_S) as watch,
    ):
        (card,) = (await client.get("/v1/models")).json()["data"]
        started = loop.time()

        async def one(request: Planned) -> float:
            await asyncio.sleep(max(0.0, started + request.at_s - loop.time()))
            timing = await timed_completion(
                client, card["id"], request.prompt, request.output_tokens
            )
            return timing.ttft_s

        ttfts = sorted(await asyncio.gather(*(one(request) for request in planned)))
        elapsed = loop.time() - started
    samples = [
        avoidable for look in watch.looks if (avoidable := _avoidable(look.loads)) is not None
    ]
    return Round(
        statistics.median(ttfts),
        ttfts[math.ceil(0.99 * len(ttfts)) - 1],
        sum(samples) / max(len(samples), 1),
        elapsed,
    )


def _avoidable(loads: list[ReplicaLoad]) -> bool | None:
    """Had another replica room for what waits somewhere? None if nothing waits."""
    queued = [load for load in loads if load["waiting"] > 0]
    if not queued:
        return None
    return any(
        other["waiting"] == 0
        and other["prefill_tokens_queued"] == 0
        and other["blocks_free"] - other["blocks_reserved_growth"]
        >= (load["waiting_blocks"] or 0) / load["waiting"]
        for load in queued
        for other in loads
        if other is not load
    )


async def compare(
    urls: dict[str, str], stores: dict[str, Store], args: argparse.Namespace
) -> dict[str, list[Round]]:
    rounds: dict[str, list[Round]] = {arm: [] for arm in urls}
    for turn in range(-1, args.pairs):
        planned = plan(args.requests if turn >= 0 else 4, args.rate, args.long_share, turn)
        # The order flips each time, so that drift of the machine falls on both.
        for arm in list(urls) if turn % 2 == 0 else reversed(urls):
            done = await run_round(urls[arm], stores[arm], planned)
            if turn < 0:
                continue
            rounds[arm].append(done)
            print(
                f"pair {turn + 1}/{args.pairs}, {arm:12}: TTFT p50 {done.ttft_p50_s:.2f} s, "
                f"p99 {done.ttft_p99_s:.2f} s; queued while the other had room "
                f"{done.queued_while_room:.0%}; {done.elapsed_s:.0f} s",
                flush=True,
            )
    return rounds


def run(args: argparse.Namespace) -> dict[str, list[Round]]:
    logs = Path(tempfile.mkdtemp(prefix="adakv-routing-"))
    print(f"starting both clusters, logs in {logs}", flush=True)
    urls, stores = {}, {}
    with ExitStack() as stack:
        for arm, policy in ARMS.items():
            config = yaml.safe_load(args.config.read_text())
            (application,) = config["applications"]
            application["args"]["routing"] = {"policy": policy}
            port = free_port()
            urls[arm] = stack.enter_context(serve_run(config, logs / f"{arm}.log", port))
            stores[arm] = Store(f"redis://127.0.0.1:{port}", application["name"])
        return asyncio.run(compare(urls, stores, args))


def summary(rounds: dict[str, list[Round]]) -> dict[str, Any]:
    return {
        arm: {
            name: round(statistics.median(getattr(done, name) for done in rows), 4)
            for name in ("ttft_p50_s", "ttft_p99_s", "queued_while_room")
        }
        for arm, rows in rounds.items()
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtest.routing", description=__doc__)
    parser.add_argument("--config", type=Path, default=Path("configs/cluster.yaml"))
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--requests", type=int, default=40)
    parser.add_argument("--rate", type=float, default=0.8, help="requests per second")
    parser.add_argument("--long-share", type=float, default=0.25)
    args = parser.parse_args(argv)
    result = summary(run(args))
    for arm, row in result.items():
        print(
            f"{arm:12}: TTFT p50 {row['ttft_p50_s']} s, p99 {row['ttft_p99_s']} s; queued while "
            f"the other had room {row['queued_while_room']:.0%}"
        )
    ours, theirs = result["ours"], result["power_of_two"]
    for name in ("ttft_p50_s", "ttft_p99_s"):
        print(f"{name}: {ours[name] / theirs[name] - 1:+.0%} against power_of_two")
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
