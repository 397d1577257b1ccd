"""`python -m loadtest.routing`: routing by occupancy against Ray Serve's own router, live.

Two clusters of two real replicas run side by side and take turns with the same requests: a few long
prompts among many short ones, at the same moments. The ledger shows meanwhile whether requests
waited at one replica while the other had room for them.
"""

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import yaml

from adakv_serve.loadtest.client.records import percentile
from adakv_serve.loadtest.client.sse_client import timed_completion
from adakv_serve.loadtest.comparison.order import interleaved
from adakv_serve.loadtest.servers.occupancy import (
    Look,
    OccupancyWatch,
    ReplicaLoad,
    occupancy_watch,
)
from adakv_serve.loadtest.servers.ports import free_port
from adakv_serve.loadtest.servers.processes import serve_run, with_args
from adakv_serve.loadtest.traffic.corpus import SENTENCE

OURS, THEIRS = "ours", "power_of_two"
ARMS = {OURS: "occupancy", THEIRS: "power_of_two"}
_SAMPLE_S = 0.2
# Sentences: about 1,600 and 90 tokens.
_LONG, _SHORT = 100, 5
_WARM_UP = 4


class Cluster(NamedTuple):
    """Where a running arm answers and reports."""

    url: str
    store_url: str
    application: str


class Mix(NamedTuple):
    """The requests of one round."""

    requests: int
    rate_per_s: float
    long_share: float


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


def plan(mix: Mix, seed: int) -> list[Planned]:
    """Return the same arrivals for a seed; no prompt begins like another, so nothing is cached."""
    rng = random.Random(seed)
    at = 0.0
    planned = []
    for number in range(mix.requests):
        at += rng.expovariate(mix.rate_per_s)
        sentences = _LONG if rng.random() < mix.long_share else _SHORT
        prompt = f"{seed}-{number}-{rng.random()}: " + SENTENCE * sentences
        planned.append(Planned(at, prompt, rng.randrange(32, 96)))
    return planned


async def run_round(
    client: httpx.AsyncClient, watch: OccupancyWatch, planned: list[Planned]
) -> Round:
    """Send every request at its time; `watch` looks meanwhile."""
    loop = asyncio.get_running_loop()
    (card,) = (await client.get("/v1/models")).json()["data"]
    started = loop.time()

    async def one(request: Planned) -> float:
        await asyncio.sleep(max(0.0, started + request.at_s - loop.time()))
        timing = await timed_completion(client, card["id"], request.prompt, request.output_tokens)
        return timing.ttft_s

    ttfts = await asyncio.gather(*(one(request) for request in planned))
    return round_figures(ttfts, watch.looks, loop.time() - started)


def round_figures(ttfts: list[float], looks: Iterable[Look], elapsed_s: float) -> Round:
    """Return the figures of a round with at least one request."""
    samples = [found for look in looks if (found := avoidable(look.loads)) is not None]
    return Round(
        statistics.median(ttfts),
        percentile(ttfts, 0.99) or 0.0,
        sum(samples) / max(len(samples), 1),
        elapsed_s,
    )


def avoidable(loads: list[ReplicaLoad]) -> bool | None:
    """Return whether another replica has room for a waiting request; None if nothing waits."""
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


async def _run_round_on(cluster: Cluster, planned: list[Planned]) -> Round:
    async with (
        httpx.AsyncClient(base_url=cluster.url, timeout=600) as client,
        occupancy_watch(cluster.store_url, cluster.application, _SAMPLE_S) as watch,
    ):
        return await run_round(client, watch, planned)


async def compare(clusters: Mapping[str, Cluster], mix: Mix, pairs: int) -> dict[str, list[Round]]:
    """Return `pairs` rounds of each arm after a warm-up."""
    rounds: dict[str, list[Round]] = {arm: [] for arm in clusters}
    for cluster in clusters.values():
        await _run_round_on(cluster, plan(mix._replace(requests=_WARM_UP), -1))
    for turn, arm in interleaved(clusters, pairs):
        done = await _run_round_on(clusters[arm], plan(mix, turn))
        rounds[arm].append(done)
        print(
            f"pair {turn + 1}/{pairs}, {arm:12}: TTFT p50 {done.ttft_p50_s:.2f} s, "
            f"p99 {done.ttft_p99_s:.2f} s; queued while the other had room "
            f"{done.queued_while_room:.0%}; {done.elapsed_s:.0f} s",
            flush=True,
        )
    return rounds


def deployment(config: dict[str, Any], policy: str) -> dict[str, Any]:
    """Return the configuration with another routing policy."""
    return with_args(config, routing={"policy": policy})


def run(config: dict[str, Any], mix: Mix, pairs: int) -> dict[str, list[Round]]:
    """Start a cluster for each arm and compare them."""
    logs = Path(tempfile.mkdtemp(prefix="adakv-routing-"))
    print(f"starting both clusters, logs in {logs}", flush=True)
    clusters = {}
    with ExitStack() as stack:
        for arm, policy in ARMS.items():
            mine, port = deployment(config, policy), free_port()
            url = stack.enter_context(serve_run(mine, logs / f"{arm}.log", port))
            name = mine["applications"][0]["name"]
            clusters[arm] = Cluster(url, f"redis://127.0.0.1:{port}", name)
        return asyncio.run(compare(clusters, mix, pairs))


def summary(rounds: Mapping[str, list[Round]]) -> dict[str, dict[str, float]]:
    """Return the medians of each arm's rounds."""
    return {
        arm: {
            name: round(statistics.median(getattr(done, name) for done in rows), 4)
            for name in ("ttft_p50_s", "ttft_p99_s", "queued_while_room")
        }
        for arm, rows in rounds.items()
    }


def report(result: Mapping[str, dict[str, float]]) -> list[str]:
    """Return a line for each arm, and one for each time against Serve's router."""
    lines = [
        f"{arm:12}: TTFT p50 {row['ttft_p50_s']} s, p99 {row['ttft_p99_s']} s; queued while "
        f"the other had room {row['queued_while_room']:.0%}"
        for arm, row in result.items()
    ]
    ours, theirs = result[OURS], result[THEIRS]
    lines += [
        f"{name}: {ours[name] / theirs[name] - 1:+.0%} against power_of_two"
        for name in ("ttft_p50_s", "ttft_p99_s")
    ]
    return lines


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtest.routing", description=__doc__)
    parser.add_argument("--config", type=Path, default=Path("configs/cluster.yaml"))
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--requests", type=int, default=40)
    parser.add_argument("--rate", type=float, default=0.8, help="requests per second")
    parser.add_argument("--long-share", type=float, default=0.25)
    args = parser.parse_args(argv)
    mix = Mix(args.requests, args.rate, args.long_share)
    result = summary(run(yaml.safe_load(args.config.read_text()), mix, args.pairs))
    print(*report(result), sep="\n")
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
