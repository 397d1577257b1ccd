"""The proofs of one HTTP answer: one for each choice, and their summary."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from adakv_serve.serving.http.sse import JsonObject
from adakv_worker.messages import Proof

# Value in a summary if the choices differ and have no mean.
MIXED = "mixed"


class AnswerProofs:
    """The latest proof of each choice of one HTTP answer.

    Choices are numbered across prompts, as in OpenAI's `choices`.
    """

    def __init__(self) -> None:
        self._choices: dict[str, int] = {}
        self._proofs: dict[tuple[str, int], Proof] = {}

    def expect(self, request_id: str, choices: int) -> None:
        """Register the next prompt by its id in the engine."""
        self._choices[request_id] = choices

    def note(self, request_id: str, choice: int, proof: Proof) -> None:
        """Keep the proof of one of the prompt's choices in place of an earlier one.

        The detail of the earlier one stays: the engine sends it once.
        """
        before = self._proofs.get((request_id, choice))
        if before is not None and proof.detail is None and proof.compressed:
            proof = proof.with_detail(before.detail)
        self._proofs[request_id, choice] = proof

    def of_choice(self, index: int) -> JsonObject | None:
        """Return the JSON of a choice's proof, or None without one."""
        for request_id, choices in self._choices.items():
            if index < choices:
                proof = self._proofs.get((request_id, index))
                return None if proof is None else proof.as_json()
            index -= choices
        return None

    def summary(self) -> JsonObject | None:
        """Return the JSON of one proof for all choices together, or None without any."""
        return summary([*self._proofs.values()])


def summary(proofs: list[Proof]) -> JsonObject | None:
    """Summarize proofs as JSON with the same keys; a single proof is its own summary.

    Equal values stay. Other numbers become their mean, which keeps the ratios between them, except
    that `..._min` becomes the least and `..._max` the greatest. Anything else becomes `MIXED`.
    """
    if not proofs:
        return None
    first, *others = [proof.as_json() for proof in proofs]
    return {key: _merged(key, [first[key], *(o[key] for o in others)]) for key in first}


def _merged(key: str, values: list[Any]) -> Any:
    first = values[0]
    if all(value == first for value in values):
        return first
    if all(isinstance(value, dict) for value in values):
        return {name: _merged(name, [value[name] for value in values]) for name in first}
    if not all(isinstance(value, (int, float)) for value in values):
        return MIXED
    if key.endswith("_min"):
        return min(values)
    if key.endswith("_max"):
        return max(values)
    mean = round(sum(values) / len(values), 3)
    whole = mean.is_integer() and all(isinstance(value, int) for value in values)
    return int(mean) if whole else mean


_current: ContextVar[AnswerProofs | None] = ContextVar("adakv_answer_proofs", default=None)


def current_answer() -> AnswerProofs | None:
    """Return the answer that this task works on, or None."""
    return _current.get()


@contextmanager
def answering() -> Iterator[AnswerProofs]:
    """Make a new answer the current one of this task and of the tasks that it starts."""
    proofs = AnswerProofs()
    token = _current.set(proofs)
    try:
        yield proofs
    finally:
        _current.reset(token)
