"""A TCP proxy of our own before a server of this machine, whose network can be taken away."""

import asyncio
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

_CHUNK_BYTES = 1 << 16


class TcpProxy:
    """Forwards connections. For one event loop.

    Stalled, it forwards nothing and keeps all connections; what has been sent comes later, as after
    lost packets. Cut, it resets all connections and refuses new ones.
    """

    def __init__(self, port: int, server_port: int) -> None:
        """
        Args:
            port: where clients connect, on 127.0.0.1.
        """
        self.port = port
        self._server_port = server_port
        self._flows = asyncio.Event()
        self._flows.set()
        self._listener: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def running(self) -> AsyncIterator["TcpProxy"]:
        """Forward for the duration of the block."""
        await self._listen()
        try:
            yield self
        finally:
            await self._close()

    @asynccontextmanager
    async def stalled(self) -> AsyncIterator[None]:
        """Forward nothing during the block."""
        self._flows.clear()
        try:
            yield
        finally:
            self._flows.set()

    @asynccontextmanager
    async def cut(self) -> AsyncIterator[None]:
        """Have no connections during the block."""
        await self._close()
        try:
            yield
        finally:
            await self._listen()

    async def _listen(self) -> None:
        self._listener = await asyncio.start_server(self._accept, "127.0.0.1", self.port)

    async def _close(self) -> None:
        assert self._listener is not None
        self._listener.close()
        for connection in self._connections:
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            await self._forward(reader, writer)
        except (OSError, asyncio.CancelledError):
            # Its server is away, or the network is: this ends the connection, and nothing else.
            pass
        finally:
            self._connections.discard(task)
            _reset(writer)

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._flows.wait()
        there, back = await asyncio.open_connection("127.0.0.1", self._server_port)
        ways = [
            asyncio.ensure_future(self._pump(reader, back)),
            asyncio.ensure_future(self._pump(there, writer)),
        ]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            _reset(back)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(_CHUNK_BYTES):
                await self._flows.wait()
                writer.write(data)
                await writer.drain()


def _reset(writer: asyncio.StreamWriter) -> None:
    at_once = struct.pack("ii", 1, 0)
    with suppress(OSError):
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, at_once)
    writer.transport.abort()
