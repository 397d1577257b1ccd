"""Whose requests these are: cached prompts are found only by requests of the same tenant."""

from contextvars import ContextVar

from vllm.v1.engine import EngineCoreRequest

from adakv_worker.salts import tenant_salt
from adakv_worker.session_messages import TENANT_KEY

# The tenant of the requests that this task sends to the engine, None for all in common.
current_tenant: ContextVar[str | None] = ContextVar("adakv_tenant", default=None)


def with_tenant(request: EngineCoreRequest) -> None:
    """Have a request share caches with those of its tenant alone.

    The tenant is the current one, or, where a request from another engine goes on, the one that its
    sampling parameters have brought.
    """
    params = request.sampling_params
    extra = (params.extra_args if params is not None else None) or {}
    tenant = current_tenant.get() or extra.get(TENANT_KEY)
    if tenant is None:
        return
    request.cache_salt = tenant_salt(tenant, request.cache_salt)
    if params is not None:
        params.extra_args = {**extra, TENANT_KEY: tenant}
