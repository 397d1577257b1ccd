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
from pathlib import Path
from typing import Any

import httpx
import yaml

from loadtest.client.sse_client import timed_completion
from loadtest.servers.processes import serve_run

_COMPANY = (1, 2, 4, 8, 16)
_SENTENCE = "The harbour master wrote down the weather of the hour and every ship that passed. "


async def measure(base_url: str, repeat: int) -> dict[str, float]:
    async with httpx.AsyncClient(base_url=base_url, timeout=600) as client:
        (card,) = (await client.get("/v1/models")).json()["data"]
        model = card["id"]
        await timed_completion(client, model, "warm up", 16)
        rates = []
        for number in range(repeat):
            prompt = f"Volume {number}. " + _SENTENCE * 95
            reply = await client.post("/tokenize", json={"model": model, "prompt": prompt})
            timing = await timed_completion(client, model, prompt, 1)
            rates.append(reply.json()["count"] / timing.ttft_s)
        steps = {}
        for company in _COMPANY:
            runs = [await _step_s(client, model, company, turn) for turn in range(repeat)]
            steps[company] = statistics.median(runs)
            print(f"{company} requests: {steps[company] * 1000:.1f} ms a step", flush=True)
    slope, alone = statistics.linear_regression([c - 1 for c in steps], list(steps.values()))
    return {
        "prefill_tokens_per_s": round(statistics.median(rates), 1),
        "decode_step_s": round(alone, 5),
        "decode_step_s_per_request": round(slope, 5),
    }


async def _step_s(client: httpx.AsyncClient, model: str, company: int, turn: int) -> float:
    """Seconds of a decode step of so many requests, while all of them run."""
    timings = await asyncio.gather(
        *(
            timed_completion(client, model, f"{turn}.{number}. {_SENTENCE}", 96)
            for number in range(company)
        )
    )
    return statistics.median((t.total_s - t.ttft_s) / (t.output_tokens - 1) for t in timings)


def run(config_path: Path, repeat: int) -> dict[str, Any]:
    config = yaml.safe_load(config_path.read_text())
    args = config["applications"][0]["args"]
    args["replica"] = {**args.get("replica", {}), "count": 1}
    log_path = Path(tempfile.mkdtemp(prefix="adakv-service-times-")) / "log"
    with serve_run(config, log_path) as base_url:
        return asyncio.run(measure(base_url, repeat))


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
