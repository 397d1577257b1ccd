"""The arms of `loadtest.published`: stock vLLM, also with a KV cache of fewer bits, and ours.

Ours may store what they keep in fewer bits, where the platform has attention for them.
"""

from typing import IO, Any, NamedTuple

from adakv_serve.loadtest.engines.process import EngineProcess

_SHARES = {"half": 2, "quarter": 4, "eighth": 8, "sixteenth": 16, "64th": 64}
# An arm's name ends in our `page_dtype`. The value is the `kv_cache_dtype` of the stock arm.
_BITS = {"fp8": "fp8", "int8": "int8_per_token_head", "int4": "int4_per_token_head"}
ARMS = ("stock", "stock-fp8", "off", *_SHARES)
# They keep as many entries as the arms without, in a half to an eighth of the bytes.
FEWER_BITS_ARMS = tuple(f"{share}-{bits}" for bits in _BITS for share in _SHARES)
# Some platforms refuse these.
MORE_ARMS = ("stock-int8", "stock-int4", *FEWER_BITS_ARMS)
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
    if arm in FEWER_BITS_ARMS:
        share, _, bits = arm.partition("-")
        as_wide = compression_of(share, setup)
        assert as_wide is not None
        return {**as_wide, "page_dtype": bits}
    parts = _SHARES[arm]
    if parts < 64:
        return {"policy": setup.policy, "budget_tokens": _LEAST_BUDGET, "keep_ratio": 1 / parts}
    # The window and the first tokens are always kept.
    budget = max(-(-setup.load.prompt_tokens // parts), 64)
    return {
        "policy": setup.policy, "budget_tokens": budget, "keep_ratio": 0.0,
        "decode_budget_tokens": budget,
    }  # fmt: skip


def start(arm: str, kv_bytes: int, setup: Setup, log: IO[str]) -> EngineProcess:
    beside = setup.beside_bytes if arm in (*_SHARES, *FEWER_BITS_ARMS) else 0
    engine = {**setup.engine, "kv_cache_memory_bytes": kv_bytes - beside}
    if arm.startswith("stock-"):
        engine["kv_cache_dtype"] = _BITS[arm.removeprefix("stock-")]
    settings = {
        "model": setup.model, "engine": engine, "compression": compression_of(arm, setup),
        "text": False,
    }  # fmt: skip
    return EngineProcess(arm, settings, setup.threads, log)
