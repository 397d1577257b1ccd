"""Streamed completions, timed as a client sees them."""

import time
from typing import Any, NamedTuple

import httpx

from adakv_serve.loadtest.client.stream import StreamedAnswer


class StreamTiming(NamedTuple):
    """Times of one answer. ttft_s: from sending to the first chunk with text."""

    ttft_s: float
    total_s: float
    output_tokens: int


async def streamed(
    client: httpx.AsyncClient,
    body: dict[str, Any],
    path: str = "/v1/completions",
    leave_after_lines: int | None = None,
) -> StreamedAnswer:
    """Return the whole answer to a request that asks for a stream.

    Args:
        leave_after_lines: close the connection after so many lines, and return what has come.

    Raises:
        StreamBroken: the server ended the stream with an error.
        httpx.HTTPError: the server refused or the connection failed.
    """
    answer = StreamedAnswer(time.perf_counter())
    lines = 0
    async with client.stream("POST", path, json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            answer.take(line, time.perf_counter())
            lines += 1
            if lines == leave_after_lines:
                break
    return answer


async def timed_completion(
    client: httpx.AsyncClient, model: str, prompt: str, output_tokens: int
) -> StreamTiming:
    """Stream exactly `output_tokens` tokens from `/v1/completions`.

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
    answer = await streamed(client, body)
    ended = time.perf_counter()
    if answer.ttft_s is None or answer.output_tokens != output_tokens:
        raise RuntimeError(f"asked for {output_tokens} tokens, received {answer.output_tokens}")
    return StreamTiming(answer.ttft_s, ended - started, answer.output_tokens)
