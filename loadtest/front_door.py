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
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import yaml

from loadtest.client.sse_client import timed_completion
from loadtest.servers.processes import serve_run, vllm_serve

THREADS = 1
STORY = (
    "The harbour master of a small northern town kept a journal of every ship that passed the "
    "breakwater, with the weather of the hour and a word about its crew. "
)


class Round(NamedTuple):
    tokens_per_s: float
    ttft_p50_s: float


async def run_round(
    client: httpx.AsyncClient,
    model: str,
    streams: int,
    requests: int,
    output_tokens: int,
    seed: int,
) -> Round:
    """Sends `requests` requests, `streams` at a time."""
    prompts = iter([f"Entry {seed}.{number}. {STORY}" for number in range(requests)])
    timings = []

    async def worker() -> None:
        for prompt in prompts:
            timings.append(await timed_completion(client, model, prompt, output_tokens))

    started = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(streams)))
    elapsed = time.perf_counter() - started
    return Round(
        sum(timing.output_tokens for timing in timings) / elapsed,
        statistics.median(timing.ttft_s for timing in timings),
    )


async def compare(
    urls: dict[str, str], model: str, streams: list[int], repeat: int, output_tokens: int
) -> dict[str, Any]:
    result: dict[str, Any] = {}
    clients = {arm: httpx.AsyncClient(base_url=url, timeout=300) for arm, url in urls.items()}
    for count in streams:
        requests = max(3, 2 * count)
        for client in clients.values():
            await run_round(client, model, count, requests, output_tokens, seed=-1)
        rounds: dict[str, list[Round]] = {arm: [] for arm in urls}
        for turn in range(repeat):
            # The order flips each time, so that drift of the machine falls on both.
            for arm in list(urls) if turn % 2 == 0 else reversed(urls):
                done = await run_round(
                    clients[arm], model, count, requests, output_tokens, seed=turn
                )
                rounds[arm].append(done)
                print(
                    f"{count} streams, round {turn + 1}/{repeat}, {arm:5}: "
                    f"{done.tokens_per_s:6.1f} tokens/s, TTFT p50 {done.ttft_p50_s * 1000:.0f} ms",
                    flush=True,
                )
        result[str(count)] = _summary(rounds)
    for client in clients.values():
        await client.aclose()
    return result


def _summary(rounds: dict[str, list[Round]]) -> dict[str, Any]:
    summary: dict[str, Any] = {}
    for arm, done in rounds.items():
        rates = [round_.tokens_per_s for round_ in done]
        summary[f"{arm}_tokens_per_s"] = round(statistics.median(rates), 2)
        summary[f"{arm}_tokens_per_s_range"] = [round(min(rates), 2), round(max(rates), 2)]
        ttft = statistics.median(round_.ttft_p50_s for round_ in done)
        summary[f"{arm}_ttft_p50_s"] = round(ttft, 4)
    pairs = zip(rounds["ours"], rounds["plain"], strict=True)
    ratios = [ours.tokens_per_s / plain.tokens_per_s for ours, plain in pairs]
    summary["ratio"] = round(statistics.median(ratios), 4)
    summary["ratio_range"] = [round(min(ratios), 4), round(max(ratios), 4)]
    return summary


def _one_replica(path: Path) -> dict[str, Any]:
    config = yaml.safe_load(path.read_text())
    args = config["applications"][0]["args"]
    # The same engine on both sides: only the doors differ.
    args["compression"] = {"enabled": False}
    args["replica"] = {**args.get("replica", {}), "count": 1, "cpus": 1, "cpu_threads": THREADS}
    return config


def _model_of(base_url: str) -> tuple[str, str]:
    """The served name and the model's path, as the running server tells them."""
    (card,) = httpx.get(f"{base_url}/v1/models", timeout=60).json()["data"]
    return card["id"], card["root"]


def run(config_path: Path, streams: list[int], repeat: int, output_tokens: int) -> dict[str, Any]:
    config = _one_replica(config_path)
    engine = config["applications"][0]["args"]["engine"]
    logs = Path(tempfile.mkdtemp(prefix="adakv-front-door-"))
    print(f"starting both servers, logs in {logs}", flush=True)
    with serve_run(config, logs / "ours.log") as ours:
        name, path = _model_of(ours)
        with vllm_serve(path, name, engine, THREADS, logs / "plain.log") as plain:
            urls = {"ours": ours, "plain": plain}
            return asyncio.run(compare(urls, name, streams, repeat, output_tokens))


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
