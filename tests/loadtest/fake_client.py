"""A client whose server is a function: OpenAI answers without a socket."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx

from tests.loadtest.fake_openai import completion_lines

# From a completion's body to its status.
Status = Callable[[dict[str, Any]], int]


def fake_client(
    asked: list[dict[str, Any]], status: Status = lambda body: 200
) -> httpx.AsyncClient:
    """Return a client of a server with the model "fake"; `asked` gets every completion's body."""

    async def answer(request: httpx.Request) -> httpx.Response:
        # Let other tasks run, like a socket.
        await asyncio.sleep(0)
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "fake"}]})
        body = json.loads(request.content)
        if request.url.path == "/tokenize":
            return httpx.Response(200, json={"count": len(body["prompt"].split())})
        assert request.url.path == "/v1/completions"
        asked.append(body)
        if (code := status(body)) != 200:
            return httpx.Response(code)
        return httpx.Response(200, text="".join(completion_lines(body, body["max_tokens"])))

    return httpx.AsyncClient(base_url="http://fake", transport=httpx.MockTransport(answer))
