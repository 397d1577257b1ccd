"""Users that ask questions with known answers, and what became of each request."""

import asyncio
import random
import time
from collections.abc import Sequence
from enum import StrEnum
from typing import Any, NamedTuple

import httpx

from adakv_serve.loadtest.client.sse_client import streamed
from adakv_serve.loadtest.client.stream import StreamBroken
from adakv_serve.loadtest.client.token_answers import Answer, ask_with_proof, likeness
from adakv_serve.loadtest.traffic.corpus import SENTENCE

# Sentences of about 16 tokens: the longer prompts are compressed.
_LENGTHS = (2, 8, 20, 40, 60)
_PAUSE_S = 0.5


class Outcome(StrEnum):
    """What became of a request.

    TIE: right up to a choice between two equally likely tokens. CONTINUED: right up to the token at
    which its cache was lost; what follows comes from a cache that was compressed anew.
    """

    RIGHT = "right"
    TIE = "tie"
    CONTINUED = "continued"
    REFUSED = "refused"
    FAILED = "failed"
    CUT = "cut"
    HUNG = "hung"
    WRONG = "wrong"


# Those of requests that were answered as they should be.
ANSWERED = (Outcome.RIGHT, Outcome.TIE, Outcome.CONTINUED)


class Reply(NamedTuple):
    """An answer to a question. proof: `kv_compression`; None if the server sent none."""

    tokens: list[int]
    proof: dict[str, Any] | None = None


class Known(NamedTuple):
    """The undisturbed answer to a question.

    compressed_tokens: cached tokens that were compressed; None if none were.
    whole: the answer without compression, where there is one: a prompt stays whole that another
        request shares.
    """

    answer: Answer
    compressed_tokens: int | None = None
    whole: Answer | None = None

    def expected(self, proof: dict[str, Any] | None) -> Answer:
        """Return the answer of a request with such a proof."""
        is_whole = proof is not None and proof["skipped"] is not None
        return self.whole if is_whole and self.whole is not None else self.answer


class Asked(NamedTuple):
    """One request. Times are the machine's, in seconds. reason: of one that was not answered."""

    began_s: float
    ended_s: float
    outcome: Outcome
    reason: str = ""


class Questions:
    """Greedy requests, each with the answer that it gets while nothing else happens."""

    def __init__(self, bodies: Sequence[dict[str, Any]], known: Sequence[Known]) -> None:
        self.bodies = bodies
        self._known = known

    @classmethod
    async def learn(
        cls, client: httpx.AsyncClient, model: str, count: int, output_tokens: int
    ) -> "Questions":
        """Ask each question alone.

        Raises:
            httpx.HTTPError: the deployment fails already.
        """
        bodies = [
            {
                "model": model, "prompt": f"{number}. " + SENTENCE * _LENGTHS[number % 5],
                "max_tokens": output_tokens, "temperature": 0, "ignore_eos": True,
                "return_token_ids": True, "vllm_xargs": {"adakv_session": "off"},
            }
            for number in range(count)
        ]  # fmt: skip
        return cls(bodies, [await _learnt(client, body) for body in bodies])

    def judge(self, number: int, reply: Reply) -> Outcome:
        """Compare an answer with the known one."""
        known = self._known[number]
        expected = known.expected(reply.proof)
        if len(reply.tokens) != len(expected.tokens):
            return Outcome.WRONG
        outcome = _compared(reply.tokens, expected)
        anew_at = _computed_anew_at(known, reply.proof)
        if outcome != Outcome.WRONG or anew_at is None:
            return outcome
        outcome = _compared(reply.tokens[:anew_at], known.answer)
        return outcome if outcome == Outcome.WRONG else Outcome.CONTINUED

    def describe(self, number: int, reply: Reply) -> str:
        """Return where an answer departs from the known one, and how it was compressed."""
        known = self._known[number]
        expected = known.expected(reply.proof)
        pairs = enumerate(zip(reply.tokens, expected.tokens, strict=False))
        first = next((at for at, (ours, theirs) in pairs if ours != theirs), None)
        where = f"question {number}, {len(reply.tokens)} tokens"
        if first is not None:
            gap = expected.gaps[first]
            where += f", the one at {first} differs (the likeliest two are {gap:.2g} apart)"
        cached, skipped = (
            (reply.proof or {}).get("original_tokens"),
            (reply.proof or {}).get("skipped"),
        )
        return (
            f"{where}; {cached} tokens cached when it was compressed ({skipped or 'done'}), "
            f"{known.compressed_tokens} undisturbed"
        )


async def _learnt(client: httpx.AsyncClient, body: dict[str, Any]) -> Known:
    asked = {**body, "logprobs": 2}
    answer, proof = await ask_with_proof(client, asked)
    if (tokens := _compressed_tokens(proof)) is None:
        return Known(answer)
    options = {**body["vllm_xargs"], "adakv_policy": "full"}
    whole, _ = await ask_with_proof(client, {**asked, "vllm_xargs": options})
    return Known(answer, tokens, whole)


def _compressed_tokens(proof: dict[str, Any] | None) -> int | None:
    if proof is None or proof["skipped"] is not None:
        return None
    tokens: int = proof["original_tokens"]
    return tokens


def _computed_anew_at(known: Known, proof: dict[str, Any] | None) -> int | None:
    """Return how many tokens of an answer were there when its cache was compressed anew, if so.

    Then they were compressed with the prompt, by the queries of the last of them.
    """
    if proof is None or known.compressed_tokens is None:
        return None
    tokens: int = proof["original_tokens"] - known.compressed_tokens
    return tokens if tokens > 0 else None


def _compared(tokens: list[int], expected: Answer) -> Outcome:
    beginning = Answer(expected.tokens[: len(tokens)], None, None, expected.gaps)
    alike = likeness([Answer(tokens, None, None, [])], [beginning])
    if alike.same:
        return Outcome.RIGHT
    return Outcome.TIE if alike.ties else Outcome.WRONG


class Users:
    """Users that send requests until `stop` is called. `asked`: the requests that have ended."""

    def __init__(self, client: httpx.AsyncClient, questions: Questions, hang_s: float) -> None:
        """
        Args:
            hang_s: a request that takes longer counts as hung.
        """
        self.asked: list[Asked] = []
        self._client = client
        self._questions = questions
        self._hang_s = hang_s
        self._enough = asyncio.Event()

    async def run(self, users: int, seed: int) -> None:
        """Ask until `stop`; return when the last request has ended."""
        await asyncio.gather(*(self._user(random.Random(f"{seed}:{at}")) for at in range(users)))

    def stop(self) -> None:
        self._enough.set()

    async def _user(self, rng: random.Random) -> None:
        while not self._enough.is_set():
            number, stream = rng.randrange(len(self._questions.bodies)), rng.random() < 0.7
            one = await self.ask(number, stream=stream)
            self.asked.append(one)
            if one.outcome not in ANSWERED:
                await asyncio.sleep(_PAUSE_S)

    async def ask(self, number: int, *, stream: bool, timeout_s: float | None = None) -> Asked:
        """Ask one question and judge the answer; `timeout_s` instead of the time for a hang."""
        began_s = time.monotonic()
        outcome, reason = Outcome.HUNG, ""
        try:
            async with asyncio.timeout(timeout_s or self._hang_s):
                outcome, reason = await self._answer(number, stream)
        except TimeoutError:
            pass
        return Asked(began_s, time.monotonic(), outcome, reason)

    async def _answer(self, number: int, stream: bool) -> tuple[Outcome, str]:
        body = self._questions.bodies[number]
        try:
            if stream:
                # The event with the usage has the proof, too.
                options = {"stream": True, "stream_options": {"include_usage": True}}
                answer = await streamed(self._client, {**body, **options})
                if not answer.finished:
                    return Outcome.CUT, "a stream without an end"
                reply = Reply(answer.token_ids, answer.proof)
            else:
                whole, proof = await ask_with_proof(self._client, body)
                reply = Reply(whole.tokens, proof)
        except httpx.HTTPStatusError as error:
            status = error.response.status_code
            stated = status == 503 and "retry-after" in error.response.headers
            return Outcome.REFUSED if stated else Outcome.FAILED, f"status {status}"
        except StreamBroken as error:
            return Outcome.FAILED, str(error)
        except httpx.HTTPError as error:
            return Outcome.CUT, f"{type(error).__name__}: {error}"
        return self._questions.judge(number, reply), self._questions.describe(number, reply)
