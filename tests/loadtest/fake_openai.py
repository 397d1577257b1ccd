"""A small OpenAI server for tests, with delays and failures on request."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TEXTS = ("one", " two", " three")


@dataclass
class Served:
    """One request: its body, and when it came and its texts left, on the machine's clock."""

    body: dict[str, Any]
    came_s: float
    texts_s: list[float] = field(default_factory=list)


@dataclass
class FakeOpenAI:
    """A server that answers every completion with `TEXTS`.

    before_headers_s, between_texts_s: how long its clients wait.
    failing: numbers of the requests that it answers with 503.
    paths: those of all requests.
    """

    before_headers_s: float = 0.0
    between_texts_s: float = 0.0
    failing: frozenset[int] = frozenset()
    served: list[Served] = field(default_factory=list)
    paths: set[str] = field(default_factory=set)
    url: str = ""

    def __post_init__(self) -> None:
        self._lock = threading.Lock()

    def begin(self, body: dict[str, Any]) -> tuple[int, Served]:
        with self._lock:
            self.served.append(Served(body, time.perf_counter()))
            return len(self.served) - 1, self.served[-1]


def completion_lines(body: dict[str, Any], tokens: int) -> Iterator[str]:
    """Yield the stream of one answer: an event for each text, and the usage in the last one."""
    chat = "messages" in body
    for text in TEXTS:
        yield _event({"choices": [{"delta": {"content": text}} if chat else {"text": text}]})
    usage = {"prompt_tokens": 7, "completion_tokens": tokens}
    yield _event({"choices": [], "usage": usage})
    yield "data: [DONE]\n\n"


def _event(event: dict[str, Any]) -> str:
    return f"data: {json.dumps(event)}\n\n"


def _handler(fake: FakeOpenAI) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            fake.paths.add(self.path)
            card = {"id": "fake", "max_model_len": 1024, "root": "fake"}
            self._answer(200, {"data": [card]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            fake.paths.add(self.path)
            number, served = fake.begin(body)
            if number in fake.failing:
                self._answer(503, {"error": {"message": "full"}})
                return
            time.sleep(fake.before_headers_s)
            self.send_response(200)
            self.end_headers()
            for line in completion_lines(body, body["max_tokens"]):
                if "text" in line or "content" in line:
                    if served.texts_s:
                        time.sleep(fake.between_texts_s)
                    served.texts_s.append(time.perf_counter())
                # A client may leave in the middle when its test ends.
                with suppress(ConnectionError):
                    self.wfile.write(line.encode())
                    self.wfile.flush()

        def _answer(self, status: int, body: dict[str, Any]) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    return Handler


@contextmanager
def serving(fake: FakeOpenAI) -> Iterator[FakeOpenAI]:
    """Serve at `fake.url` for the duration of the block."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(fake))
    fake.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield fake
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
