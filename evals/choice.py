"""A policy with a budget, and the outcome of a sample under it."""

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

FULL = "full"
# Whether a turn resumes the cache of the turn before, and which entries then compete.
Session = Literal["off", "newest", "all"]


class Choice(NamedTuple):
    """A policy and its budget.

    tokens: entries per head on average.
    ratio: share of the prompt.
    alpha, window_tokens: None for the preset's own.
    decode_tokens: entries per head that evictions while decoding leave; None for no evictions.
    session: `off` to compress the whole history anew; None where there are no turns.
    """

    policy: str
    tokens: int | None = None
    ratio: float | None = None
    alpha: float | None = None
    window_tokens: int | None = None
    decode_tokens: int | None = None
    session: Session | None = None

    @property
    def label(self) -> str:
        parts = [self.policy]
        parts += [f"alpha={self.alpha:g}"] if self.alpha is not None else []
        parts += [f"window={self.window_tokens}"] if self.window_tokens is not None else []
        parts += [f"session={self.session}"] if self.session is not None else []
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
            "adakv_session": "auto" if self.session in ("newest", "all") else self.session,
        }  # fmt: skip
        return {name: value for name, value in given.items() if value is not None}


@dataclass
class Outcome:
    """Outcome of one sample under one choice.

    predicted: most likely token at each position of the answer.
    surprise: -log p of each forced token that comes from the compressed cache, in nats.
    agreement: for each of these, whether the most likely token is the full cache's.
    kl: for each of these, KL(full || this), in nats.
    kept_tokens: entries per head on average, as the engine counts them.
    skipped: reason for which the engine did not compress.
    tokens: all tokens of the answer, forced ones included.
    """

    predicted: list[int] = field(default_factory=list)
    surprise: list[float] = field(default_factory=list)
    agreement: list[bool] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    kept_tokens: float | None = None
    skipped: str | None = None
    tokens: list[int] = field(default_factory=list)
