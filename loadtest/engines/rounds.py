"""The figures of one round of requests, from the steps that an engine took."""

from collections.abc import Sequence
from typing import Any, NamedTuple


class Step(NamedTuple):
    """One engine step: its seconds, the prompt tokens and the requests that decoded in it."""

    seconds: float
    prefill_tokens: int
    decodes: int

    @classmethod
    def of(cls, seconds: float, prompt_tokens: int, decodes: int, decoded_tokens: int) -> "Step":
        """Make a step from vLLM's counts.

        vLLM counts a request that is computed again after a preemption as one that decodes many
        tokens: then all of the step's decodes count as prefill.
        """
        if decoded_tokens > decodes:
            return cls(seconds, prompt_tokens + decoded_tokens, 0)
        return cls(seconds, prompt_tokens, decodes)


class Compression(NamedTuple):
    """What compression took in a round; all zero for stock vLLM.

    prepare_s: planning of steps of decodes alone. extra_bytes: most held beside the KV blocks.
    """

    compress_s: float = 0.0
    evict_s: float = 0.0
    prepare_s: float = 0.0
    extra_bytes: int = 0


def step_figures(steps: Sequence[Step], compression: Compression) -> dict[str, Any]:
    """Return where the time went: prefills, decodes and compression.

    Requests that decode in a step with prefills count as decodes, at the price of a token in the
    steps of decodes alone.
    """
    pure = [step for step in steps if not step.prefill_tokens]
    mixed = [step for step in steps if step.prefill_tokens]
    pure_s = sum(step.seconds for step in pure)
    per_token = pure_s / max(sum(step.decodes for step in pure), 1)
    riding_s = sum(step.decodes for step in mixed) * per_token
    mixed_s = sum(step.seconds for step in mixed)
    prefill_s = max(mixed_s - riding_s - compression.compress_s, 1e-9)
    return {
        "prefill_s": prefill_s,
        "compress_s": compression.compress_s,
        "evict_s": compression.evict_s,
        "decode_s": pure_s + riding_s,
        "decode_tokens_per_s": _rate_at_peak(pure),
        "compress_share": compression.compress_s / prefill_s,
        "prepare_share": compression.prepare_s / max(pure_s, 1e-9),
        "extra_bytes": compression.extra_bytes,
    }


def _rate_at_peak(pure: Sequence[Step]) -> float:
    """Return tokens per second of the largest batches of decodes."""
    peak = max((step.decodes for step in pure), default=0)
    largest = [step for step in pure if step.decodes >= 0.95 * peak]
    return sum(step.decodes for step in largest) / max(sum(s.seconds for s in largest), 1e-9)
