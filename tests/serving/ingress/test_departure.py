"""An ingress that Serve removes ends at a limit what still runs."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Iterator

import pytest

from adakv_serve.serving.http.asgi import Message, Receive, Scope, Send
from adakv_serve.serving.http.draining import Draining
from adakv_serve.serving.http.openai_error import error_messages
from adakv_serve.serving.ingress.departure import Departure

# As `serving.http.edge` makes it of Serve's text, and as a deployment has it.
OPENAI_ERROR = error_messages(503, "DRAINING", type_="ServiceUnavailable")[1]["body"].decode()


class Replica:
    """An HTTP port that answers health checks as a replica of Serve does."""

    def __init__(self) -> None:
        self.answers = [(200, "success")]
        # One for each question.
        self.asked = asyncio.Semaphore(0)

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator[int]:
        server = await asyncio.start_server(self.answer, "127.0.0.1", 0)
        async with server:
            yield server.sockets[0].getsockname()[1]

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError):
            while head := await reader.readuntil(b"\r\n\r\n"):
                assert head.startswith(b"GET /-/healthz ")
                status, text = self.answers[0]
                head = f"HTTP/1.1 {status} X\r\ncontent-length: {len(text)}\r\n\r\n".encode()
                writer.write(head + text.encode())
                self.asked.release()
        writer.close()


async def _app(scope: Scope, receive: Receive, send: Send) -> None:
    pass


async def _nothing_comes() -> Message:
    return {"type": "http.disconnect"}


async def _nobody_reads(message: Message) -> None:
    pass


@contextlib.contextmanager
def _departing(port: int, draining: Draining, *, has_own_port: bool = True) -> Iterator[None]:
    departure = Departure(0.01, logging.getLogger(), has_own_port=has_own_port, look_s=0.01)
    app = departure.noting_address(_app)

    async def run() -> None:
        # A client has said that it speaks TLS.
        scheme = "https" if has_own_port else "http"
        scope = {"type": "http", "scheme": scheme, "server": ("127.0.0.1", port)}
        await app(scope, _nothing_comes, _nobody_reads)
        await departure.end_at_limit(draining)

    task = asyncio.create_task(run())
    yield
    task.cancel()


@pytest.mark.parametrize("text", ["DRAINING", OPENAI_ERROR])
async def test_a_removed_ingress_ends_what_runs(text: str) -> None:
    replica, draining = Replica(), Draining(lambda: 0.0)
    async with replica.listening() as port:
        with draining.note("long"), _departing(port, draining):
            await replica.asked.acquire()
            replica.answers = [(503, text)]
            await asyncio.wait_for(draining.cut.wait(), 30)


@pytest.mark.parametrize(
    "answer", [(200, "success"), (503, "UNHEALTHY"), (503, "This node is being drained.")]
)
async def test_an_ingress_that_stays_ends_nothing(answer: tuple[int, str]) -> None:
    replica, draining = Replica(), Draining(lambda: 0.0)
    replica.answers = [answer]
    async with replica.listening() as port:
        with draining.note("long"), _departing(port, draining):
            cut = draining.cut
            for _ in range(20):
                await replica.asked.acquire()
            assert not cut.is_set()


async def test_a_port_that_is_shut_belongs_to_a_removed_replica() -> None:
    replica, draining = Replica(), Draining(lambda: 0.0)
    async with replica.listening() as port:
        pass
    with draining.note("long"), _departing(port, draining):
        await asyncio.wait_for(draining.cut.wait(), 30)


async def test_a_proxys_port_that_is_shut_ends_nothing() -> None:
    replica, draining = Replica(), Draining(lambda: 0.0)
    async with replica.listening() as port:
        pass
    with draining.note("long"), _departing(port, draining, has_own_port=False):
        cut = draining.cut
        # The proxy comes back.
        async with await asyncio.start_server(replica.answer, "127.0.0.1", port):
            for _ in range(3):
                await replica.asked.acquire()
        assert not cut.is_set()
