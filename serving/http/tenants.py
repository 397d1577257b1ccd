"""Names under which a replica's app finds a request's tenant and the holder of its cache."""

import hashlib
from collections.abc import Mapping

# In a request's scope: the replica that probably holds its cache.
HOLDER = "adakv.holder"
# The header with a request's tenant. The front door sets it, and removes what a client has sent.
TENANT_HEADER = b"x-adakv-tenant"
_DIGITS = 16


def tenant_of(headers: Mapping[str, str]) -> str | None:
    """Return the tenant of a request that was let in, without its key; None if it has no key."""
    authorization = headers.get("authorization")
    if authorization is None:
        return None
    return hashlib.sha256(authorization.partition(" ")[2].encode()).hexdigest()[:_DIGITS]
