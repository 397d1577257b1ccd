"""`python -m loadtest.service_times`: what one replica's work takes, for `router.simulate`.

Starts one replica of the configuration, times prefills alone and decodes in company, and fits a
line through the decode steps.
"""

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import yaml

from adakv_serve.loadtest.client.sse_client import timed_completion
from adakv_serve.loadtest.servers.processes import serve_run, with_args
from adakv_serve.loadtest.traffic.corpus import SENTENCE

_COMPANY = (1, 2, 4, 8, 16)
_PROMPT_SENTENCES = 95
_OUTPUT_TOKENS = 96


async def measure(
    client: httpx.AsyncClient,
    repeat: int,
    company: Sequence[int] = _COMPANY,
    prompt_sentences: int = _PROMPT_SENTENCES,
) -> dict[str, float]:
    """Return the times of the server that `client` asks.

    Args:
        company: numbers of requests that decode together, at least two.
        prompt_sentences: length of the timed prefills.
    """
    (card,) = (await client.get("/v1/models")).json()["data"]
    model = card["id"]
    await timed_completion(client, model, "warm up", 16)
    rates = []
    for number in range(repeat):
        prompt = f"Volume {number}. " + SENTENCE * prompt_sentences
        reply = await client.post("/tokenize", json={"model": model, "prompt": prompt})
        timing = await timed_completion(client, model, prompt, 1)
        rates.append(reply.json()["count"] / timing.ttft_s)
    steps = {}
    for count in company:
        runs = [await _step_s(client, model, count, turn) for turn in range(repeat)]
        steps[count] = statistics.median(runs)
        print(f"{count} requests: {steps[count] * 1000:.1f} ms a step", flush=True)
    return fitted(rates, steps)


def fitted(rates: Sequence[float], steps: Mapping[int, float]) -> dict[str, float]:
    """Return the simulator's times from prefill rates and decode steps by number of requests."""
    slope, alone = statistics.linear_regression([c - 1 for c in steps], list(steps.values()))
    return {
        "prefill_tokens_per_s": round(statistics.median(rates), 1),
        "decode_step_s": round(alone, 5),
        "decode_step_s_per_request": round(slope, 5),
    }


async def _step_s(client: httpx.AsyncClient, model: str, company: int, turn: int) -> float:
    """Return the seconds of a decode step while this many requests run."""
    timings = await asyncio.gather(
        *(
            timed_completion(client, model, f"{turn}.{number}. {SENTENCE}", _OUTPUT_TOKENS)
            for number in range(company)
        )
    )
    return statistics.median((t.total_s - t.ttft_s) / (t.output_tokens - 1) for t in timings)


def one_replica(config: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration with a single replica."""
    (application,) = config["applications"]
    return with_args(config, replica={**application["args"].get("replica", {}), "count": 1})


async def _measure_at(base_url: str, repeat: int) -> dict[str, float]:
    async with httpx.AsyncClient(base_url=base_url, timeout=600) as client:
        return await measure(client, repeat)


def run(config_path: Path, repeat: int) -> dict[str, float]:
    """Start one replica and measure it."""
    config = one_replica(yaml.safe_load(config_path.read_text()))
    log_path = Path(tempfile.mkdtemp(prefix="adakv-service-times-")) / "log"
    with serve_run(config, log_path) as base_url:
        return asyncio.run(_measure_at(base_url, repeat))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtest.service_times", description=__doc__)
    parser.add_argument("--config", type=Path, default=Path("configs/cluster.yaml"))
    parser.add_argument("--blocks", type=int, help="for --json: as `router.inspect` shows it")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args(argv)
    if args.json and args.blocks is None:
        parser.error("--json needs --blocks")
    times = run(args.config, args.repeat)
    print(times)
    if args.json:
        figures = {"times": {"blocks_total": args.blocks, **times}}
        args.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
