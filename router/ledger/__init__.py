"""The ledger of live occupancy: what replicas report, and where Redis keeps it.

The reports' schema is handed on here. `redis_ledger` and `subscription` need Redis.
"""

from adakv_serve.router.ledger.occupancy import REPORT_TTL_S, Occupancy, SchemaMismatch
from adakv_serve.router.ledger.prefixes import PrefixChange

__all__ = ["REPORT_TTL_S", "Occupancy", "PrefixChange", "SchemaMismatch"]
