"""A closed loop of mixed sessions, some of whose clients leave."""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence

import httpx

from adakv_serve.loadtest.client.sse_client import streamed
from adakv_serve.loadtest.client.stream import StreamBroken
from adakv_serve.loadtest.traffic.workloads import Session, Sizes, Tokenizer, request_body, sessions

WORKLOADS = ("mixed", "chat", "regenerate", "agent", "code", "long-document-qa")
_LEAVING_SHARE = 0.1
_REFUSED_PAUSE_S = 1.0
_TEMPLATE_TOKENS = 64


def mixed_sessions(
    tokenizer: Tokenizer, context_tokens: int, sizes: Sizes, seed: int
) -> Iterator[Session]:
    """Yield sessions of all workloads in turn, without end."""
    every = [
        sessions(name, tokenizer, context_tokens - _TEMPLATE_TOKENS, sizes, seed)
        for name in WORKLOADS
    ]
    while True:
        for one in every:
            yield next(one)


async def fill_by_size(
    client: httpx.AsyncClient, model: str, vocabulary: int, seed: int, most_tokens: int = 400
) -> None:
    """Ask for a prompt of each length up to `most_tokens`, one after the other.

    oneDNN keeps a compiled product and its description, a quarter of a MiB, for each of the last
    numbers of tokens that an engine has computed at once. Under load an engine on a CPU grows for
    an hour until it keeps as many as it ever does, which a slope would take for a leak.

    Raises:
        httpx.HTTPError: a prompt gets no answer.
    """
    rng = random.Random(seed)
    for tokens in range(1, most_tokens + 1):
        prompt = [rng.randrange(vocabulary) for _ in range(tokens)]
        body = {"model": model, "prompt": prompt, "max_tokens": 1}
        (await client.post("/v1/completions", json=body)).raise_for_status()


class MixedLoad:
    """Users that run one session after the other; `outcomes` counts what became of requests."""

    def __init__(
        self, client: httpx.AsyncClient, model: str, asked: Iterator[Session], seed: int
    ) -> None:
        self.outcomes: Counter[str] = Counter()
        self._client = client
        self._model = model
        self._asked = asked
        self._rng = random.Random(seed)

    async def run(self, users: int, seconds: float) -> None:
        """Begin sessions for so long; return when the last answer has ended."""
        until_s = time.monotonic() + seconds
        await asyncio.gather(*(self._user(until_s) for _ in range(users)))

    async def _user(self, until_s: float) -> None:
        while time.monotonic() < until_s:
            session = next(self._asked)
            answers: list[str] = []
            while len(answers) < len(session.turns) and time.monotonic() < until_s:
                answer = await self._ask(session, answers)
                if answer is None:
                    break
                answers.append(answer)

    async def _ask(self, session: Session, answers: Sequence[str]) -> str | None:
        """Return the answer of a session's next turn; None where the session ends with it."""
        path, body = request_body(session, len(answers), list(answers), self._model)
        body |= {"stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True}
        leave = self._rng.randint(1, 20) if self._rng.random() < _LEAVING_SHARE else None
        try:
            answer = await streamed(self._client, body, path, leave)
        except httpx.HTTPStatusError as error:
            self.outcomes[f"status {error.response.status_code}"] += 1
            await asyncio.sleep(_REFUSED_PAUSE_S)
            return None
        except (httpx.HTTPError, StreamBroken) as error:
            self.outcomes[f"{type(error).__name__}: {error}"] += 1
            await asyncio.sleep(_REFUSED_PAUSE_S)
            return None
        if answer.finished:
            self.outcomes["answered"] += 1
            return answer.text
        self.outcomes["left" if leave is not None else "cut"] += 1
        return None

    @property
    def failures(self) -> dict[str, int]:
        """Return the outcomes that an idle deployment would not have had, by reason."""
        return {
            reason: count
            for reason, count in self.outcomes.items()
            if reason not in ("answered", "left", "status 503")
        }
