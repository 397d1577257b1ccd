"""Salts of cached prompts. Requests with different salts find none of each other's caches."""

import hashlib


def tenant_salt(tenant: str | None, cache_salt: str | None) -> str | None:
    """Return the salt of a tenant's request, from what its `cache_salt` says.

    No `cache_salt` gives a request another tenant's salt.

    Args:
        tenant: None where all requests are in common.
    """
    if tenant is None:
        return cache_salt
    text = repr((tenant, cache_salt)).encode("utf-8", "surrogatepass")
    return hashlib.blake2b(text, digest_size=16).hexdigest()


def seed_hash(salt: str | None, adapter: str | None) -> int:
    """Return the `prefix_hash` before a prompt's first block; 0 without salt and LoRA adapter.

    Args:
        adapter: name of the adapter.
    """
    if salt is None and adapter is None:
        return 0
    text = repr((salt, adapter)).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest())
