"""Turns of one conversation, each checked against a forward pass that sees what its tokens saw."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from tests.adakv_worker.engines import Engine, Reference, Result

SESSIONS = {"enabled": True, "min_saved_tokens": 1, "share": 1.0, "compress": "newest"}


class Conversation:
    """Turns of one conversation, and what each of its tokens has attended to.

    tokens: those of the last turn, its answer included.
    seen: [L, H, n, n] bool, the entries that each of them attended to.
    """

    def __init__(
        self,
        engine: Engine,
        reference: Reference,
        tolerance: float = 1e-3,
        difference: Callable[[Sequence[float]], float] = max,
        **options: Any,
    ) -> None:
        """
        Args:
            tolerance: most by which log-probabilities of a token may differ.
            difference: of all its differences, the one that counts.
            options: `extra_args` of every turn.
        """
        self._engine = engine
        self._tolerance = tolerance
        self._difference = difference
        self._reference = reference
        self._options = options
        self.tokens: list[int] = []
        self.seen = torch.zeros(0)
        self._kept = torch.zeros(0)
        self.proof: dict[str, Any] = {}

    @property
    def resumed(self) -> int:
        """Tokens of the last turn that were not computed."""
        return int(self.proof["session"]["resumed_tokens"])

    def turn(self, ids: list[int], max_tokens: int = 12) -> Result:
        """Ask with these tokens, and check the answer."""
        params = self._engine.params(max_tokens=max_tokens, extra_args=self._options or None)
        (result,) = self._engine.run([ids], params)
        self.note(result)
        return result

    def note(self, result: Result, kept_at: Sequence[torch.Tensor | None] | None = None) -> None:
        """Check an answer.

        Args:
            kept_at: for each of its tokens the entries of its step among the first, if they change.
        """
        assert result.proof is not None
        self.proof = result.proof
        self._follow(result, self.resumed, kept_at)
        logprobs = self._reference.seeing(self.tokens, self.seen)
        expected = logprobs[len(result.prompt) - 1 :]
        for step, (token, candidates) in enumerate(
            zip(result.tokens, result.logprobs, strict=True)
        ):
            off = self._difference(
                [
                    abs(logprob - float(expected[step, candidate]))
                    for candidate, logprob in candidates.items()
                ]
            )
            assert off < self._tolerance, f"step {step}: off by {off}"
            assert float(expected[step].max() - expected[step, token]) < self._tolerance

    def _follow(
        self, result: Result, resumed: int, kept_at: Sequence[torch.Tensor | None] | None
    ) -> None:
        n = len(result.prompt)
        tokens = [*result.prompt, *result.tokens]
        last = result.kept if kept_at is None else kept_at[-1]
        assert last is not None
        layers, heads = last.shape[:2]
        seen = torch.ones((len(tokens), len(tokens)), dtype=torch.bool).tril()
        seen = seen.expand(layers, heads, -1, -1).clone()
        if resumed:
            assert tokens[:resumed] == self.tokens[:resumed]
            seen[:, :, :resumed, :resumed] = self.seen[:, :, :resumed, :resumed]
            before = self._kept[..., :resumed]
            seen[:, :, resumed:n, : before.shape[-1]] &= before[:, :, None]
        # Where all entries of the new turn stay, there is no record of them.
        kept = torch.nn.functional.pad(last, (0, max(0, n - last.shape[-1])), value=True)
        if kept_at is None:
            seen[:, :, n:, :n] &= kept[:, :, None, :]
        # The first token comes from the prompt's own step.
        for row, one in enumerate((kept_at or ())[1:], start=n):
            assert one is not None
            seen[:, :, row, : one.shape[-1]] &= one
        self.tokens, self.seen, self._kept = tokens, seen, kept
