"""`python -m serving.ingress.bench`: the ingress' own time for a request, beside a long prompt.

It renders prompts of several sizes with the embedded model's renderer, alone and while requests of
almost 1 MiB are rendered one after the other. `render` is the time until a prompt's footprint is
known; `delay` is how late the event loop runs meanwhile, which every other request feels.
"""

import argparse
import asyncio
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

from adakv_serve.serving.config import AppConfig
from adakv_serve.serving.ingress.footprints import FootprintPredictor, footprint_predictor

_PATH = "/v1/chat/completions"
# About a token each.
_WORD = "word "
_LONG_WORDS = 200_000
_TICK_S = 0.001


def _body(words: int, number: int) -> bytes:
    content = f"{number} {_WORD * words}"
    return json.dumps({"messages": [{"role": "user", "content": content}]}).encode()


async def _ticks(delays_s: list[float]) -> None:
    """Note how much later than asked for the event loop wakes this task."""
    while True:
        began = time.perf_counter()
        await asyncio.sleep(_TICK_S)
        delays_s.append(time.perf_counter() - began - _TICK_S)


async def _long_prompts(predictor: FootprintPredictor, done: list[str | None]) -> None:
    for number in range(1_000_000):
        prediction = await predictor.predict(_PATH, _body(_LONG_WORDS, number))
        done.append(prediction.unknown)


async def measure(
    predictor: FootprintPredictor, words: int, requests: int, *, beside: bool
) -> dict[str, Any]:
    """Return the figures for prompts of so many words, one after the other."""
    delays_s: list[float] = []
    long_done: list[str | None] = []
    others = [asyncio.create_task(_ticks(delays_s))]
    if beside:
        others.append(asyncio.create_task(_long_prompts(predictor, long_done)))
        await asyncio.sleep(0.1)
    times_s, tokens = [], 0
    for number in range(requests):
        # Requests that were rendered before are remembered.
        body = _body(words, number + beside * requests)
        began = time.perf_counter()
        prediction = await predictor.predict(_PATH, body)
        times_s.append(time.perf_counter() - began)
        assert prediction.footprint is not None
        tokens = prediction.footprint.prompt_tokens
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    return {
        "tokens": tokens, "beside_a_long_prompt": beside, "requests": requests,
        "long_prompts": len(long_done), **_percentiles("render", times_s),
        **_percentiles("delay", delays_s),
    }  # fmt: skip


def _percentiles(name: str, values_s: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(values_s, n=100)
    return {f"{name}_p50_ms": round(1e3 * cuts[49], 2), f"{name}_p99_ms": round(1e3 * cuts[98], 2)}


async def _run(requests: int) -> list[dict[str, Any]]:
    # vLLM does not tokenize what is too long for the model.
    os.environ["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"
    config = AppConfig.model_validate({"engine": {"max_model_len": 2 * _LONG_WORDS}})
    predictor = footprint_predictor(config)
    rows = []
    for words in (100, 1000, 7900):
        for beside in (False, True):
            rows.append(await measure(predictor, words, requests, beside=beside))
            print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=300, help="for each size")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    rows = asyncio.run(_run(args.requests))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
