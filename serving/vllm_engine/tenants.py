"""ASGI middleware that has the engine know whose an HTTP request is, and who holds its cache."""

from adakv_serve.serving.http.asgi import ASGIApp, Receive, Scope, Send
from adakv_serve.serving.http.tenants import HOLDER, TENANT_HEADER
from adakv_serve.serving.http.tracing import serving_span
from adakv_worker.frontend.session_moves import ProbableHolder, probable_holder
from adakv_worker.frontend.tenants import current_tenant


class TenantMiddleware:
    """An ASGI app around a replica's, for the requests that it makes to the engine."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        named = dict(scope.get("headers", ())).get(TENANT_HEADER)
        tenant = current_tenant.set(named.decode("latin-1") if named is not None else None)
        holder_id = scope.get(HOLDER)
        holder = probable_holder.set(ProbableHolder(holder_id) if holder_id is not None else None)
        headers = list(scope.get("headers", ()))
        try:
            with serving_span("replica", headers):
                await self._app({**scope, "headers": headers}, receive, send)
        finally:
            current_tenant.reset(tenant)
            probable_holder.reset(holder)
