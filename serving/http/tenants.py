"""Names under which a replica's app finds a request's tenant and the holder of its cache."""

# In a request's scope: the replica that probably holds its cache.
HOLDER = "adakv.holder"
# The header with a request's tenant. The front door sets it, and removes what a client has sent.
TENANT_HEADER = b"x-adakv-tenant"
