"""Answers as token ids, and how many of them are those of other answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import httpx

from adakv_serve.loadtest.client.sse_client import streamed

# Two logits that are closer may change places with the order of additions.
_TIE = 1e-4


@dataclass
class Answer:
    """The tokens of one answer.

    ttft_s, tpot_s: None where it was not streamed.
    gaps: between the log probabilities of the two most likely tokens at each step, if asked for.
    """

    tokens: list[int]
    ttft_s: float | None
    tpot_s: float | None
    gaps: list[float]


async def ask(client: httpx.AsyncClient, body: dict[str, Any]) -> Answer:
    """Return the answer to a completion that asks for `return_token_ids`.

    Raises:
        httpx.HTTPError, StreamBroken: the server failed it.
    """
    if body.get("stream"):
        answer = await streamed(client, body)
        return Answer(answer.token_ids, answer.ttft_s, answer.tpot_s, [])
    return (await ask_with_proof(client, body)).answer


class Proven(NamedTuple):
    """proof: the answer's `kv_compression`; None from a server that does not compress."""

    answer: Answer
    proof: dict[str, Any] | None


async def ask_with_proof(client: httpx.AsyncClient, body: dict[str, Any]) -> Proven:
    """Return the whole answer to a completion that asks for `return_token_ids`.

    Raises:
        httpx.HTTPError: the server failed it.
    """
    response = await client.post("/v1/completions", json=body)
    response.raise_for_status()
    content = response.json()
    (choice,) = content["choices"]
    tops = (choice["logprobs"] or {}).get("top_logprobs") or []
    gaps = [_gap(sorted(top.values(), reverse=True)) for top in tops]
    return Proven(Answer(choice["token_ids"], None, None, gaps), content.get("kv_compression"))


def _gap(logprobs: list[float]) -> float:
    # Two tokens of the same text come as one.
    return logprobs[0] - logprobs[1] if len(logprobs) > 1 else 0.0


class Likeness(NamedTuple):
    """same: answers that are identical. ties: others whose first difference is a near tie."""

    same: int
    ties: int
    total: int


def likeness(answers: Sequence[Answer], expected: Sequence[Answer]) -> Likeness:
    """Compare answers with expected ones, which have their gaps."""
    same = ties = 0
    for ours, theirs in zip(answers, expected, strict=True):
        pairs = enumerate(zip(ours.tokens, theirs.tokens, strict=True))
        first = next((step for step, (a, b) in pairs if a != b), None)
        same += first is None
        ties += first is not None and theirs.gaps[first] < _TIE
    return Likeness(same, ties, len(expected))
