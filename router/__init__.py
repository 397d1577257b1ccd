"""Routing by live KV-memory occupancy: the ledger of reports, the score and the choice."""

from adakv_serve.router.ledger.occupancy import Occupancy, SchemaMismatch

DEFAULT_STORE_PORT = 6390
DEFAULT_STORE_URL = f"redis://127.0.0.1:{DEFAULT_STORE_PORT}"
DEFAULT_KEY_PREFIX = "adakv"
DEFAULT_APPLICATION = "llm"

__all__ = [
    "DEFAULT_APPLICATION",
    "DEFAULT_KEY_PREFIX",
    "DEFAULT_STORE_PORT",
    "DEFAULT_STORE_URL",
    "Occupancy",
    "SchemaMismatch",
]
