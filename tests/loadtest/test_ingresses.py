"""What the figures of several front doors count."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from adakv_serve.loadtest.ingresses import Load, measured

LOAD = Load(requests=6, at_once=2, prompts=2, repeats=3, simultaneous=4)


class Forgetful(BaseHTTPRequestHandler):
    """Sends the prompts of even numbers to `a`, and each other one to the next replica."""

    turn = 0

    def do_GET(self) -> None:
        self._answer("a", {"data": [{"id": "fake"}]})

    def do_POST(self) -> None:
        prompt = json.loads(self.rfile.read(int(self.headers["content-length"])))["prompt"]
        if prompt.startswith("1: "):
            type(self).turn += 1
        self._answer("ab"[self.turn % 2] if prompt.startswith("1: ") else "a", {})

    def _answer(self, replica: str, body: object) -> None:
        self.send_response(200)
        self.send_header("x-replica-id", replica)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Forgetful)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


async def test_repeated_and_simultaneous_prompts_are_counted_by_their_replicas(url: str) -> None:
    figures = await measured(url, LOAD)
    # One prompt came back three times of three, the other one time.
    assert (figures.returned, figures.fullest) == (4 / 6, 1.0)
    assert figures.requests_per_s > 0
    assert figures.p99_ms >= figures.p50_ms > 0
