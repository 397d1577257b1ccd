"""What is kept of a cache, and what comes of it."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

FULL = "full"


class Choice(NamedTuple):
    """A policy and what it keeps. ratio: of the prompt; tokens: entries for each head on average.

    alpha, window_tokens: None takes the preset's own.
    decode_tokens: what evictions leave while it decodes; None: there are none.
    """

    policy: str
    tokens: int | None = None
    ratio: float | None = None
    alpha: float | None = None
    window_tokens: int | None = None
    decode_tokens: int | None = None

    @property
    def label(self) -> str:
        parts = [self.policy]
        parts += [f"alpha={self.alpha:g}"] if self.alpha is not None else []
        parts += [f"window={self.window_tokens}"] if self.window_tokens is not None else []
        return " ".join(parts)

    @property
    def kept(self) -> str:
        if self.policy == FULL:
            return "all"
        if self.decode_tokens is not None:
            return f"{self.decode_tokens} while decoding"
        return str(self.tokens) if self.tokens is not None else f"{self.ratio:g}x"

    def xargs(self) -> dict[str, Any]:
        given = {
            "adakv_policy": self.policy, "adakv_budget_tokens": self.tokens,
            "adakv_keep_ratio": self.ratio, "adakv_alpha": self.alpha,
            "adakv_window_tokens": self.window_tokens,
            "adakv_decode_budget_tokens": self.decode_tokens,
        }  # fmt: skip
        return {name: value for name, value in given.items() if value is not None}


@dataclass
class Outcome:
    """Of one sample under one choice.

    predicted: the most likely token for each of the answer's.
    The rest is of those that come from the compressed cache. surprise: -log p of the answer's own,
    in nats. agreement: whether the most likely is the full cache's. kl: KL(full || this), in nats.
    kept_tokens: entries for each head on average, by the engine's own count.
    said: all that came, what was forced too.
    """

    predicted: list[int] = field(default_factory=list)
    surprise: list[float] = field(default_factory=list)
    agreement: list[bool] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    kept_tokens: float | None = None
    skipped: str | None = None
    said: list[int] = field(default_factory=list)
