"""The part of a compressed cache that is exact, to which it can be cut back."""

from typing import NamedTuple

from adakv_serve.kernels.policies.presets import PolicyChoice


class Floor(NamedTuple):
    """From `tokens` tokens on, every head of a compressed cache has an entry for every token.

    entries: entries per head on average at `tokens` tokens.
    """

    tokens: int
    entries: int

    def entries_at(self, num_tokens: int) -> int:
        """Return the entries per head on average of the cache cut back to so many tokens."""
        assert num_tokens >= self.tokens, "a compressed cache is cut below its floor"
        return self.entries + num_tokens - self.tokens


class Resumed(NamedTuple):
    """How a request begins with a held cache.

    held: the cache's name. turn: prompts that are compressed into it, this one included.
    base: tokens that it saves, and their entries per head.
    floor: how far the cache can be cut back.
    among: last entries of each head that compete at the end of the prompt; None: all of them.
    keep: entries per head on average that stay of those that compete.
    choice: how they are chosen, by no more queries than this request computes.
    compressed_at: tokens of the prompts before.
    copies: whether the cache stays held, because other requests want it, too.
    """

    held: str
    turn: int
    base: Floor
    floor: Floor
    compressed_at: int
    among: int | None
    keep: int
    choice: PolicyChoice
    copies: bool = False
