"""The protocol between the front door and what answers its requests."""

from collections.abc import AsyncGenerator, Callable
from typing import Protocol

from adakv_serve.serving.http.asgi import Message, Scope


class Backend(Protocol):
    """Where requests go. Its methods raise `BackendFailure`."""

    def stream(
        self, scope: Scope, body: bytes, pay: Callable[[int], None]
    ) -> AsyncGenerator[list[Message], None]:
        """Send one request to a replica and yield its response; closing cancels the request.

        Args:
            pay: called with the numbers of tokens that the request has computed.
        """
        ...

    async def ping(self) -> None:
        """Return when some replica has answered."""
        ...
