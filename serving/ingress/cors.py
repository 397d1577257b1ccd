"""Answers that scripts of other origins may read."""

from typing import Any

from starlette.middleware.cors import CORSMiddleware

from adakv_serve.serving.http.asgi import ASGIApp, Message, Receive, Scope, Send


def with_cors(app: ASGIApp, server: dict[str, Any]) -> ASGIApp:
    """Return an app whose answers, errors included, allow the origins of vLLM's options.

    It answers preflight requests itself: they need no key, and so must not reach an engine. Without
    allowed origins, vLLM's default, nothing is added.
    """
    origins = server.get("allowed_origins") or []
    if not origins:
        return app
    return CORSMiddleware(
        _without_inner_cors(app),
        allow_origins=origins,
        allow_credentials=server.get("allow_credentials", False),
        allow_methods=server.get("allowed_methods", ["*"]),
        allow_headers=server.get("allowed_headers", ["*"]),
    )


def _without_inner_cors(app: ASGIApp) -> ASGIApp:
    """Return an app whose answers lack what vLLM's own middleware adds: it would be there twice."""

    async def call(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_on(message: Message) -> None:
            if "headers" in message:
                headers = [_without_origin(*header) for header in message["headers"]]
                headers = [header for header in headers if header != (b"vary", b"")]
                message = {**message, "headers": headers}
            await send(message)

        if "headers" in scope:
            headers = [(name, value) for name, value in scope["headers"] if name != b"origin"]
            scope = {**scope, "headers": headers}
        await app(scope, receive, send_on)

    return call


def _without_origin(name: bytes, value: bytes) -> tuple[bytes, bytes]:
    if name.lower() != b"vary":
        return name, value
    varying = [one for one in value.split(b",") if one.strip().lower() != b"origin"]
    return b"vary", b",".join(varying).strip()
