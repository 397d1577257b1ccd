"""The HTTP front door: authentication, limits, errors and retries in front of any engine backend.

It speaks ASGI and OpenAI's error form. Ray stays behind the `Backend` protocol, whose failures are
those of `serving.http.failures`.
"""

from adakv_serve.serving.http.asgi import Receive, Scope, Send, run_lifespan
from adakv_serve.serving.http.door import Door
from adakv_serve.serving.http.exchange import Exchange


class FrontDoor(Door):
    """An ASGI app. One instance serves all requests of an ingress replica."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await run_lifespan(receive, send)
        elif scope["type"] == "http":
            await Exchange(self, scope, receive, send).run()
        else:
            await send({"type": "websocket.close", "code": 1003})
