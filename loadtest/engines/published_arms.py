"""The arms of `loadtest.published`: stock vLLM, stock with an fp8 KV cache, and ours.

Ours may store what they keep in eight bits, where the platform has attention for it.
"""

from typing import IO, Any, NamedTuple

from adakv_serve.loadtest.engines.process import EngineProcess

_SHARES = {"half": 2, "quarter": 4, "eighth": 8, "sixteenth": 16, "64th": 64}
_EIGHT_BITS = "-fp8"
ARMS = ("stock", "stock-fp8", "off", *_SHARES)
# As many entries, in a half or a quarter of the bytes.
EIGHT_BIT_ARMS = tuple(f"{share}{_EIGHT_BITS}" for share in _SHARES)
_LEAST_BUDGET = 32


class Load(NamedTuple):
    requests: int
    prompt_tokens: int
    output_tokens: int


class Setup(NamedTuple):
    """The settings of all arms. beside_bytes: taken off the KV bytes of those that compress."""

    model: str
    engine: dict[str, Any]
    policy: str
    load: Load
    beside_bytes: int
    threads: int


def compression_of(arm: str, setup: Setup) -> dict[str, Any] | None:
    """Return the arm's compression settings; None for stock vLLM."""
    if arm.startswith("stock"):
        return None
    if arm == "off":
        return {"policy": "full"}
    if arm in EIGHT_BIT_ARMS:
        as_wide = compression_of(arm.removesuffix(_EIGHT_BITS), setup)
        assert as_wide is not None
        return {**as_wide, "page_dtype": "fp8"}
    share = _SHARES[arm]
    if share < 64:
        return {"policy": setup.policy, "budget_tokens": _LEAST_BUDGET, "keep_ratio": 1 / share}
    # The window and the first tokens are always kept.
    budget = max(-(-setup.load.prompt_tokens // share), 64)
    return {
        "policy": setup.policy, "budget_tokens": budget, "keep_ratio": 0.0,
        "decode_budget_tokens": budget,
    }  # fmt: skip


def start(arm: str, kv_bytes: int, setup: Setup, log: IO[str]) -> EngineProcess:
    beside = setup.beside_bytes if arm in (*_SHARES, *EIGHT_BIT_ARMS) else 0
    engine = {**setup.engine, "kv_cache_memory_bytes": kv_bytes - beside}
    if arm == "stock-fp8":
        engine["kv_cache_dtype"] = "fp8"
    settings = {
        "model": setup.model, "engine": engine, "compression": compression_of(arm, setup),
        "text": False,
    }  # fmt: skip
    return EngineProcess(arm, settings, setup.threads, log)
