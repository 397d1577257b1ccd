"""`python -m loadtest.front_door`: what our front door costs against plain `vllm serve`.

Both servers run the same engine with the same threads, one replica each, side by side; rounds
alternate between them, and each sends the same prompts with the same number of streams.
"""

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import yaml

from adakv_serve.loadtest.client.sse_client import timed_completion
from adakv_serve.loadtest.comparison.order import interleaved
from adakv_serve.loadtest.servers.processes import serve_run, vllm_serve, with_args

OURS, PLAIN = "ours", "plain"
THREADS = 1
STORY = (
    "The harbour master of a small northern town kept a journal of every ship that passed the "
    "breakwater, with the weather of the hour and a word about its crew. "
)


class Round(NamedTuple):
    tokens_per_s: float
    ttft_p50_s: float


class Streams(NamedTuple):
    """What a round sends: `requests` requests, `at_once` at a time."""

    at_once: int
    requests: int
    output_tokens: int


async def run_round(client: httpx.AsyncClient, model: str, streams: Streams, seed: int) -> Round:
    """Send the prompts of a seed."""
    prompts = iter([f"Entry {seed}.{number}. {STORY}" for number in range(streams.requests)])
    timings = []

    async def stream() -> None:
        for prompt in prompts:
            timings.append(await timed_completion(client, model, prompt, streams.output_tokens))

    started = time.perf_counter()
    await asyncio.gather(*(stream() for _ in range(streams.at_once)))
    elapsed = time.perf_counter() - started
    return Round(
        sum(timing.output_tokens for timing in timings) / elapsed,
        statistics.median(timing.ttft_s for timing in timings),
    )


async def compare(
    clients: Mapping[str, httpx.AsyncClient], model: str, streams: Streams, repeat: int
) -> dict[str, Any]:
    """Return the figures of both arms after a warm-up and `repeat` rounds each."""
    for client in clients.values():
        await run_round(client, model, streams, seed=-1)
    rounds: dict[str, list[Round]] = {arm: [] for arm in clients}
    for turn, arm in interleaved(clients, repeat):
        done = await run_round(clients[arm], model, streams, seed=turn)
        rounds[arm].append(done)
        print(
            f"{streams.at_once} streams, round {turn + 1}/{repeat}, {arm:5}: "
            f"{done.tokens_per_s:6.1f} tokens/s, TTFT p50 {done.ttft_p50_s * 1000:.0f} ms",
            flush=True,
        )
    return summary(rounds)


def summary(rounds: Mapping[str, list[Round]]) -> dict[str, Any]:
    """Return the medians of both arms, and the ratios of rounds with the same prompts."""
    figures: dict[str, Any] = {}
    for arm, done in rounds.items():
        rates = [one.tokens_per_s for one in done]
        figures[f"{arm}_tokens_per_s"] = round(statistics.median(rates), 2)
        figures[f"{arm}_tokens_per_s_range"] = [round(min(rates), 2), round(max(rates), 2)]
        ttft = statistics.median(one.ttft_p50_s for one in done)
        figures[f"{arm}_ttft_p50_s"] = round(ttft, 4)
    pairs = zip(rounds[OURS], rounds[PLAIN], strict=True)
    ratios = [ours.tokens_per_s / plain.tokens_per_s for ours, plain in pairs]
    figures["ratio"] = round(statistics.median(ratios), 4)
    figures["ratio_range"] = [round(min(ratios), 4), round(max(ratios), 4)]
    return figures


def one_replica(config: dict[str, Any]) -> dict[str, Any]:
    """Return the deployment with the engine that plain vLLM runs too: only the doors differ."""
    (application,) = config["applications"]
    replica = {
        **application["args"].get("replica", {}),
        "count": 1,
        "cpus": 1,
        "cpu_threads": THREADS,
    }
    return with_args(config, compression={"enabled": False}, replica=replica)


def _model_of(base_url: str) -> tuple[str, str]:
    """Return the served name and the model's path, as the running server lists them."""
    (card,) = httpx.get(f"{base_url}/v1/models", timeout=60).json()["data"]
    return card["id"], card["root"]


async def _compare_all(
    urls: Mapping[str, str], model: str, counts: list[int], repeat: int, output_tokens: int
) -> dict[str, Any]:
    async with AsyncExitStack() as stack:
        clients = {
            arm: await stack.enter_async_context(httpx.AsyncClient(base_url=url, timeout=300))
            for arm, url in urls.items()
        }
        return {
            str(count): await compare(
                clients, model, Streams(count, max(3, 2 * count), output_tokens), repeat
            )
            for count in counts
        }


def run(config_path: Path, counts: list[int], repeat: int, output_tokens: int) -> dict[str, Any]:
    """Start both servers and compare them at each number of streams."""
    config = one_replica(yaml.safe_load(config_path.read_text()))
    engine = config["applications"][0]["args"]["engine"]
    logs = Path(tempfile.mkdtemp(prefix="adakv-front-door-"))
    print(f"starting both servers, logs in {logs}", flush=True)
    with serve_run(config, logs / "ours.log") as ours:
        name, path = _model_of(ours)
        with vllm_serve(path, name, engine, THREADS, logs / "plain.log") as plain:
            urls = {OURS: ours, PLAIN: plain}
            return asyncio.run(_compare_all(urls, name, counts, repeat, output_tokens))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtest.front_door", description=__doc__)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--config", type=Path, default=Path("configs/cluster.yaml"))
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--repeat", type=int, default=9, help="rounds for each arm")
    parser.add_argument("--output-tokens", type=int, default=128)
    args = parser.parse_args(argv)
    result = run(args.config, args.streams, args.repeat, args.output_tokens)
    for count, row in result.items():
        print(
            f"{count} streams: ours {row['ours_tokens_per_s']} tokens/s, "
            f"plain {row['plain_tokens_per_s']} tokens/s, ratio {row['ratio']} "
            f"{row['ratio_range']}; TTFT p50 {row['ours_ttft_p50_s']} s "
            f"against {row['plain_ttft_p50_s']} s"
        )
    if args.json:
        args.json.write_text(json.dumps({"streams": result}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
