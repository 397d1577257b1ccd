"""One streamed completion, timed as a client sees it."""

import json
import time
from typing import NamedTuple

import httpx


class StreamTiming(NamedTuple):
    """Times of one answer. `ttft_s` runs from sending to the first chunk that carries text."""

    ttft_s: float
    total_s: float
    output_tokens: int


async def timed_completion(
    client: httpx.AsyncClient, model: str, prompt: str, output_tokens: int
) -> StreamTiming:
    """Streams exactly `output_tokens` tokens from `/v1/completions`.

    Raises:
        RuntimeError: the stream broke, or another number of tokens came.
        httpx.HTTPError: the server refused or the connection failed.
    """
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": output_tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    started = time.perf_counter()
    first: float | None = None
    received = 0
    async with client.stream("POST", "/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise RuntimeError(f"the stream broke: {event['error']['message']}")
            if first is None and event["choices"] and event["choices"][0]["text"]:
                first = time.perf_counter()
            if event.get("usage"):
                received = event["usage"]["completion_tokens"]
    ended = time.perf_counter()
    if first is None or received != output_tokens:
        raise RuntimeError(f"asked for {output_tokens} tokens, received {received}")
    return StreamTiming(first - started, ended - started, received)
