"""The part of a compressed cache that is exact, to which it can be cut back."""

from typing import NamedTuple


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
