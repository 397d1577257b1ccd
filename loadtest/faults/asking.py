"""Users that ask questions with known answers, and what became of each request."""

import asyncio
import random
import time
from collections.abc import Sequence
from enum import StrEnum
from typing import Any, NamedTuple

import httpx

from loadtest.client.sse_client import streamed
from loadtest.client.stream import StreamBroken
from loadtest.client.token_answers import Answer, ask, likeness
from loadtest.traffic.corpus import SENTENCE

# Sentences of about 16 tokens: the longer prompts are compressed.
_LENGTHS = (2, 8, 20, 40, 60)
_PAUSE_S = 0.5


class Outcome(StrEnum):
    """What became of a request. TIE: right up to a choice between two equally likely tokens."""

    RIGHT = "right"
    TIE = "tie"
    REFUSED = "refused"
    FAILED = "failed"
    CUT = "cut"
    HUNG = "hung"
    WRONG = "wrong"


class Asked(NamedTuple):
    """One request. Times are the machine's, in seconds. reason: of one that was not answered."""

    began_s: float
    ended_s: float
    outcome: Outcome
    reason: str = ""


class Questions:
    """Greedy requests, each with the answer that it gets while nothing else happens."""

    def __init__(self, bodies: Sequence[dict[str, Any]], answers: Sequence[Answer]) -> None:
        self.bodies = bodies
        self._answers = answers

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
        return cls(bodies, [await ask(client, {**body, "logprobs": 2}) for body in bodies])

    def judge(self, number: int, tokens: list[int]) -> Outcome:
        """Compare an answer with the known one."""
        expected = self._answers[number]
        if len(tokens) != len(expected.tokens):
            return Outcome.WRONG
        alike = likeness([Answer(tokens, None, None, [])], [expected])
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
            if one.outcome not in (Outcome.RIGHT, Outcome.TIE):
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
                answer = await streamed(self._client, {**body, "stream": True})
                if not answer.finished:
                    return Outcome.CUT, "a stream without an end"
                tokens = answer.token_ids
            else:
                tokens = (await ask(self._client, body)).tokens
        except httpx.HTTPStatusError as error:
            status = error.response.status_code
            stated = status == 503 and "retry-after" in error.response.headers
            return Outcome.REFUSED if stated else Outcome.FAILED, f"status {status}"
        except StreamBroken as error:
            return Outcome.FAILED, str(error)
        except httpx.HTTPError as error:
            return Outcome.CUT, f"{type(error).__name__}: {error}"
        return self._questions.judge(number, tokens), f"question {number}"
