"""What a replica's app is told of a request's session: its tenant, and who holds its cache."""

import hashlib
from collections.abc import Mapping

# In a request's scope: the replica that probably holds its cache.
HOLDER = "adakv.holder"
# The header by which the front door tells whose API key a request has; it removes a client's own.
TENANT_HEADER = b"x-adakv-tenant"
_DIGITS = 16


def tenant_of(headers: Mapping[str, str]) -> str | None:
    """Return the tenant of a request that was let in, without its key; None if it has no key."""
    authorization = headers.get("authorization")
    if authorization is None:
        return None
    return hashlib.sha256(authorization.partition(" ")[2].encode()).hexdigest()[:_DIGITS]
