"""Whose requests these are: held caches are found only by requests of the same tenant."""

from contextvars import ContextVar
from typing import Any

from vllm.sampling_params import SamplingParams

from adakv_worker.session_messages import TENANT_KEY

# The tenant of the requests that this task sends to the engine, None for all in common.
current_tenant: ContextVar[str | None] = ContextVar("adakv_tenant", default=None)


def with_tenant(params: Any) -> None:
    """Note the current tenant in a request's sampling parameters."""
    tenant = current_tenant.get()
    if tenant is not None and isinstance(params, SamplingParams):
        params.extra_args = {**(params.extra_args or {}), TENANT_KEY: tenant}
