"""Whose requests these are: cached prompts are found only by requests of the same tenant."""

from contextvars import ContextVar

from vllm.v1.engine import EngineCoreRequest

from adakv_worker.salts import tenant_salt
from adakv_worker.session_messages import TENANT_KEY

# The tenant of the requests that this task sends to the engine, None for all in common.
current_tenant: ContextVar[str | None] = ContextVar("adakv_tenant", default=None)


def with_tenant(request: EngineCoreRequest) -> None:
    """Have a request, which is not sent yet, share caches with those of its tenant alone."""
    tenant = current_tenant.get()
    if tenant is None:
        return
    request.cache_salt = tenant_salt(tenant, request.cache_salt)
    params = request.sampling_params
    if params is not None:
        params.extra_args = {**(params.extra_args or {}), TENANT_KEY: tenant}
