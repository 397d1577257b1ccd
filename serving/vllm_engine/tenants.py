"""ASGI middleware that has the engine know whose requests an HTTP request makes."""

from adakv_worker.frontend.tenants import current_tenant
from serving.http.asgi import ASGIApp, Receive, Scope, Send
from serving.http.tenants import TENANT_HEADER


class TenantMiddleware:
    """An ASGI app around a replica's, whose requests to the engine are of the tenant named."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        named = dict(scope.get("headers", ())).get(TENANT_HEADER)
        token = current_tenant.set(named.decode("latin-1") if named is not None else None)
        try:
            await self._app(scope, receive, send)
        finally:
            current_tenant.reset(token)
