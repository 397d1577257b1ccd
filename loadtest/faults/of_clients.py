"""Faults of clients: they leave, send half a request, and read slowly."""

import asyncio
import json
import socket
import time
from collections.abc import Sequence
from http.client import HTTPException, HTTPResponse
from urllib.parse import urlsplit

from adakv_serve.loadtest.faults.scene import Scene
from adakv_serve.loadtest.fuzzing.exchange import exchange
from adakv_serve.loadtest.fuzzing.sending import Sending
from adakv_serve.loadtest.traffic.corpus import SENTENCE

_CLIENTS = 12
_LONG_TOKENS = 400
_SLOW_CLIENTS, _SLOW_S, _SLOW_TOKENS = 6, 8.0, 120
# A piece of an answer, and the pause before the next.
_PIECE_BYTES, _PIECE_S = 64, 0.1
# As small as Linux allows.
_WINDOW_BYTES = 2304
# Log probabilities and the prompt make an answer of some hundred kilobytes.
_LARGE = {"logprobs": 5, "echo": True, "prompt": SENTENCE * 30}


def _request(scene: Scene, *, stream: bool, **changes: object) -> bytes:
    body = {"model": scene.model, "prompt": "Once", "max_tokens": _LONG_TOKENS, "ignore_eos": True,
            "stream": stream, **changes}  # fmt: skip
    data = json.dumps(body).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    return head + b"content-length: %d\r\n\r\n" % len(data) + data


def _any_request(scene: Scene) -> bytes:
    return _request(scene, stream=scene.rng.random() < 0.5)


async def leave(scene: Scene) -> tuple[()]:
    """Ask for long answers and leave at different moments."""
    sendings = [
        Sending((_any_request(scene),), (), leaves_after_s=scene.rng.uniform(0, 3))
        for _ in range(_CLIENTS)
    ]
    await asyncio.gather(*(asyncio.to_thread(exchange, scene.url, one, 10) for one in sendings))
    return ()


async def stall(scene: Scene) -> tuple[()]:
    """Send a part of a request and nothing more for some seconds."""
    data = _any_request(scene)
    sendings = [
        Sending((data[: scene.rng.randrange(1, len(data))],), (), leaves_after_s=8.0)
        for _ in range(_CLIENTS)
    ]
    await asyncio.gather(*(asyncio.to_thread(exchange, scene.url, one, 20) for one in sendings))
    return ()


async def read_slowly(scene: Scene) -> Sequence[str]:
    """Read streams and large answers a few bytes at a time, and then the rest of them.

    Returns:
        What was wrong with the answers, which must all be whole.
    """
    requests = [
        _request(scene, stream=True, max_tokens=_SLOW_TOKENS)
        if number % 2
        else _request(scene, stream=False, max_tokens=_SLOW_TOKENS, **_LARGE)
        for number in range(_SLOW_CLIENTS)
    ]
    found = await asyncio.gather(
        *(asyncio.to_thread(_read_slowly, scene, one, _SLOW_S) for one in requests)
    )
    return [problem for problem in found if problem is not None]


def _read_slowly(scene: Scene, request: bytes, slow_s: float) -> str | None:
    """Send a request and read its answer, slowly for a time; return what was wrong with it."""
    parts = urlsplit(scene.url)
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _WINDOW_BYTES)
        connection.settimeout(scene.hang_s)
        try:
            connection.connect((parts.hostname, parts.port))
            connection.sendall(request)
            response = HTTPResponse(connection, method="POST")
            response.begin()
            body = _slow_body(response, slow_s)
        except (OSError, HTTPException) as error:
            return f"a slow reader's answer broke: {error!r}"
    if response.status != 200:
        return f"a slow reader's answer has status {response.status}"
    is_stream = response.headers.get_content_type() == "text/event-stream"
    is_whole = body.endswith(b"data: [DONE]\n\n") if is_stream else _is_json(body)
    return None if is_whole else f"a slow reader's answer ends in {body[-100:]!r}"


def _slow_body(response: HTTPResponse, slow_s: float) -> bytes:
    body, until_s = b"", time.monotonic() + slow_s
    while time.monotonic() < until_s:
        if not (piece := response.read(_PIECE_BYTES)):
            return body
        body += piece
        time.sleep(_PIECE_S)
    return body + response.read()


def _is_json(body: bytes) -> bool:
    try:
        json.loads(body)
    except ValueError:
        return False
    return True
