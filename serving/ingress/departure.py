"""The end of an ingress replica that Serve removes: streams left at its limit get an error event.

Serve removes a replica without a call to its code, and kills it at the limit. For some seconds the
replica's own HTTP port answers health checks, such as HAProxy's, with "DRAINING".
"""

import asyncio
import logging

import aiohttp

from adakv_serve.serving.http.asgi import ASGIApp, Receive, Scope, Send
from adakv_serve.serving.http.draining import Draining

_LOOK_S = 2.0


class Departure:
    """Watches whether Serve removes this replica, and then ends at a limit what still runs."""

    def __init__(
        self,
        limit_s: float,
        logger: logging.Logger,
        *,
        has_own_port: bool,
        look_s: float = _LOOK_S,
    ) -> None:
        """
        Args:
            limit_s: time from a replica's removal to the end of its requests.
            has_own_port: whether requests come to a port of this replica, as they do from HAProxy,
                and not to one of Serve's own proxy.
            look_s: between two questions for its health.
        """
        self._has_own_port = has_own_port
        self._limit_s = limit_s
        self._logger = logger
        self._look_s = look_s
        # That of this replica, once a request has come.
        self._url: str | None = None

    def noting_address(self, app: ASGIApp) -> ASGIApp:
        """Return an app that does the same, and whose requests tell the replica's address."""

        async def call(scope: Scope, receive: Receive, send: Send) -> None:
            if self._url is None and (server := scope.get("server")) and server[1]:
                host = f"[{server[0]}]" if ":" in server[0] else server[0]
                # HAProxy forwards the client's X-Forwarded-Proto, but uses plain HTTP to this port.
                scheme = "http" if self._has_own_port else scope.get("scheme", "http")
                self._url = f"{scheme}://{host}:{server[1]}"
            await app(scope, receive, send)

        return call

    async def end_at_limit(self, draining: Draining) -> None:
        """Wait for this replica's removal, and end its requests at the limit."""
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(self._look_s)) as client:
            while not await self._is_removed(client):
                await asyncio.sleep(self._look_s)
        await asyncio.sleep(self._limit_s)
        if left := draining.running():
            self._logger.warning("removed with %d requests left, which end now", len(left))
        draining.cut_all()

    async def _is_removed(self, client: aiohttp.ClientSession) -> bool:
        if self._url is None:
            return False
        try:
            async with client.get(f"{self._url}/-/healthz") as answer:
                # In plain text or in an error object. Serve's own proxy has other words for the
                # removal of its node.
                return answer.status == 503 and "DRAINING" in await answer.text()
        except aiohttp.ClientConnectorError as error:
            # The port is shut some seconds after the removal. On a busy machine that may be the
            # first thing to be seen.
            return self._has_own_port and isinstance(error.os_error, ConnectionRefusedError)
        except (aiohttp.ClientError, TimeoutError):
            return False
