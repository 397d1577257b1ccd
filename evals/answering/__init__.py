"""What answers: an engine in this process, or a server over HTTP."""

from collections.abc import Iterable
from typing import Any, Protocol

from adakv_serve.evals.choice import Choice, Outcome
from adakv_serve.evals.samples import Sample, Tokens


class Answering(Protocol):
    """An engine or a server."""

    @property
    def tokenizer(self) -> Any: ...

    def outcomes(
        self, sample: Sample, tokens: Tokens, choices: Iterable[Choice]
    ) -> dict[Choice, Outcome]:
        """Force a sample's answer and return the outcomes, the full cache's first."""
        ...

    def answers(
        self, prompt: list[int], begin: list[int], max_tokens: int, choices: Iterable[Choice]
    ) -> dict[Choice, Outcome]:
        """Return the model's own answers as `predicted`.

        Args:
            begin: tokens forced before the answer.
        """
        ...

    def close(self) -> None:
        """End what answers."""
        ...
