"""The workloads: sessions of turns from real text, the same for equal seeds."""

import itertools
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from adakv_serve.loadtest.traffic import corpus

# Questions that any passage can be asked.
_QUESTIONS = (
    "Who speaks first in the passage, and to whom?",
    "What does the passage tell about the place where it happens?",
    "Which of the persons is described in the most detail, and how?",
    "What do the persons disagree about?",
    "Which event of the passage matters most for what follows it?",
    "How does the mood change from the first paragraph to the last?",
    "Which words show what the author thinks of the persons?",
    "What would be different if the last paragraph came first?",
)
# Tokens of the chat template, the instruction and the numbering around a passage.
_AROUND_TOKENS = 64
# Tokens of the chat template around a message and its answer.
_TURN_TOKENS = 12
# Share of an agent's context that its task takes, and what tools return: a median, as in published
# traces of coding agents, with a long tail.
_TASK_SHARE, _TOOL_SIGMA = 0.25, 0.8
_ASK_AGAIN = 1 / 3


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that a workload uses."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...

    def decode(self, token_ids: list[int]) -> str: ...


class Turn(NamedTuple):
    """One request. `prompt` is a chat message, or the whole prompt of a plain completion.

    again: whether it asks the turn before once more, whose answer the new one replaces.
    """

    prompt: str | list[int]
    output_tokens: int
    again: bool = False


class Session(NamedTuple):
    """Turns that follow each other, each with all before it as history.

    chat: whether they are chat messages; else plain completions.
    at_s: when the first is due, from the start; None where the load decides.
    """

    session_id: str
    turns: tuple[Turn, ...]
    chat: bool = True
    at_s: float | None = None


@dataclass(frozen=True)
class Sizes:
    """Lengths of a workload; for `mixed` and sessions the most common ones."""

    prompt_tokens: int
    output_tokens: int

    @classmethod
    def of_context(cls, context_tokens: int) -> "Sizes":
        """Return five eighths of the context to read and an eighth to write."""
        return cls(context_tokens * 5 // 8, context_tokens // 8)


class Passages:
    """Random stretches of a text, cut by tokens."""

    def __init__(self, text: str, tokenizer: Tokenizer, rng: random.Random) -> None:
        self._text = text
        self._tokenizer = tokenizer
        self._rng = rng
        self._number = 0

    def take(self, tokens: int) -> list[int]:
        """Return the ids of `tokens` tokens from a random paragraph or line on."""
        start = self._text.find("\n", self._rng.randrange(len(self._text))) + 1
        characters = 6 * tokens
        ids: list[int] = []
        # Mostly one round; a tokenizer of longer tokens needs more.
        while len(ids) < tokens:
            stretch = self._text[start : start + characters]
            while len(stretch) < characters:
                # After the end comes the beginning.
                stretch += self._text[: characters - len(stretch)]
            ids = self._tokenizer.encode(stretch, add_special_tokens=False)
            characters *= 2
        return ids[:tokens]

    def text(self, tokens: int) -> str:
        """Return a stretch as text after a random number, so that prompts share no block."""
        self._number += 1
        serial = f"{self._rng.randrange(10**6)}.{self._number}: "
        return serial + self._tokenizer.decode(self.take(max(1, tokens - _AROUND_TOKENS)))


class Source(NamedTuple):
    """The inputs of a workload."""

    tokenizer: Tokenizer
    sizes: Sizes
    context_tokens: int
    rng: random.Random

    def passages(self, text: str) -> Passages:
        return Passages(text, self.tokenizer, self.rng)


def long_document_qa(source: Source) -> Iterator[Session]:
    """Yield a long passage with a question about it."""
    passages, sizes = source.passages(corpus.novels()), source.sizes
    for number in itertools.count():
        passage = passages.text(sizes.prompt_tokens)
        question = source.rng.choice(_QUESTIONS)
        prompt = f"{passage}\n\nThis was a passage of a novel. {question}"
        yield Session(f"qa-{number}", (Turn(prompt, sizes.output_tokens),))


def summarize(source: Source) -> Iterator[Session]:
    """Yield a long passage to be summarized, with twice the answer."""
    passages, sizes = source.passages(corpus.novels()), source.sizes
    for number in itertools.count():
        prompt = f"{passages.text(sizes.prompt_tokens)}\n\nSummarize this passage in ten sentences."
        yield Session(f"summary-{number}", (Turn(prompt, 2 * sizes.output_tokens),))


def chat(source: Source) -> Iterator[Session]:
    """Yield conversations of up to six turns about a passage, with a full prompt at the end."""
    passages, sizes = source.passages(corpus.novels()), source.sizes
    per_turn = max(1, sizes.output_tokens // 2)
    for number in itertools.count():
        count = source.rng.randint(3, 6)
        history = (count - 1) * (per_turn + _AROUND_TOKENS)
        opening = passages.text(max(2 * _AROUND_TOKENS, sizes.prompt_tokens - history))
        questions = source.rng.sample(_QUESTIONS, count)
        turns = [Turn(f"{opening}\n\n{questions[0]}", per_turn)]
        turns += [Turn(question, per_turn) for question in questions[1:]]
        yield Session(f"chat-{number}", tuple(turns))


def regenerate(source: Source) -> Iterator[Session]:
    """Yield the conversations of `chat`, of whose turns a third are asked once more."""
    for session in chat(source):
        turns = []
        for turn in session.turns:
            turns.append(turn)
            if source.rng.random() < _ASK_AGAIN:
                turns.append(turn._replace(again=True))
        yield session._replace(session_id=f"again-{session.session_id}", turns=tuple(turns))


def agent(source: Source) -> Iterator[Session]:
    """Yield agents of 20 to 40 short answers, on a context that grows by what tools return.

    At the end a prompt is full. In published traces tools return 400 tokens in the median.
    """
    passages, sizes = source.passages(corpus.code()), source.sizes
    answer = max(1, sizes.output_tokens // 8)
    for number in itertools.count():
        task = int(_TASK_SHARE * sizes.prompt_tokens)
        most = (sizes.prompt_tokens - task) // (answer + _TURN_TOKENS + 1)
        count = max(1, min(source.rng.randint(20, 40), most))
        room = sizes.prompt_tokens - task - count * (answer + _TURN_TOKENS)
        weights = [source.rng.lognormvariate(0.0, _TOOL_SIGMA) for _ in range(count - 1)]
        scale = max(0, room) / max(sum(weights), 1.0)
        results = [max(1, int(scale * weight)) for weight in weights]
        turns = [Turn(passages.text(task), answer)]
        turns += [Turn(source.tokenizer.decode(passages.take(size)), answer) for size in results]
        yield Session(f"agent-{number}", tuple(turns))


def code(source: Source) -> Iterator[Session]:
    """Yield the beginning of a file to be completed, with half the answer."""
    passages, sizes = source.passages(corpus.code()), source.sizes
    for number in itertools.count():
        turn = Turn(passages.text(sizes.prompt_tokens), max(1, sizes.output_tokens // 2))
        yield Session(f"code-{number}", (turn,), chat=False)


def mixed(source: Source) -> Iterator[Session]:
    """Yield lengths with a long tail: log-normal, sigma 1 for prompts and 0.7 for answers.

    Their medians are a quarter of the sizes; the context cuts them.
    """
    passages, sizes = source.passages(corpus.novels()), source.sizes
    for number in itertools.count():
        answer = _log_normal(source.rng, sizes.output_tokens / 4, 0.7)
        answer = min(answer, source.context_tokens // 4)
        prompt = _log_normal(source.rng, sizes.prompt_tokens / 4, 1.0)
        prompt = min(prompt, source.context_tokens - answer - _AROUND_TOKENS)
        question = source.rng.choice(_QUESTIONS)
        turn = Turn(f"{passages.text(prompt)}\n\n{question}", answer)
        yield Session(f"mixed-{number}", (turn,))


def synthetic(source: Source) -> Iterator[Session]:
    """Yield exactly the sizes of prompt and answer, for comparison with published set-ups."""
    passages, sizes = source.passages(corpus.novels()), source.sizes
    for number in itertools.count():
        ids = passages.take(sizes.prompt_tokens)
        serial = source.tokenizer.encode(f"{source.rng.random()} ", add_special_tokens=False)
        ids[: len(serial)] = serial[: len(ids)]
        yield Session(f"synthetic-{number}", (Turn(ids, sizes.output_tokens),), chat=False)


WORKLOADS: dict[str, Callable[[Source], Iterator[Session]]] = {
    "long-document-qa": long_document_qa,
    "summarize": summarize,
    "chat": chat,
    "regenerate": regenerate,
    "agent": agent,
    "code": code,
    "mixed": mixed,
    "synthetic": synthetic,
}


def sessions(
    workload: str,
    tokenizer: Tokenizer,
    context_tokens: int,
    sizes: Sizes | None = None,
    seed: int = 0,
) -> Iterator[Session]:
    """Return an endless stream of sessions, the same for equal arguments.

    Args:
        context_tokens: the longest that prompt and answer may be together.
        sizes: None for a share of the context.

    Raises:
        ValueError: there is no such workload, or its sizes exceed the context.
    """
    if workload not in WORKLOADS:
        raise ValueError(f"unknown workload '{workload}': known are {', '.join(WORKLOADS)}")
    sizes = sizes or Sizes.of_context(context_tokens)
    if sizes.prompt_tokens + 2 * sizes.output_tokens > context_tokens:
        raise ValueError(
            f"{sizes.prompt_tokens} prompt tokens and up to twice {sizes.output_tokens} output "
            f"tokens exceed the context of {context_tokens}"
        )
    rng = random.Random(f"{workload}:{seed}")
    return WORKLOADS[workload](Source(tokenizer, sizes, context_tokens, rng))


def request_body(
    session: Session, turn: int, answers: list[str], model: str
) -> tuple[str, dict[str, Any]]:
    """Return path and JSON body of a session's turn after the answers to the turns before."""
    asked = session.turns[turn]
    body: dict[str, Any] = {"model": model, "max_tokens": asked.output_tokens, "temperature": 0}
    if not session.chat:
        return "/v1/completions", {**body, "prompt": asked.prompt}
    messages = []
    replaced = [after.again for after in session.turns[1 : turn + 1]]
    for before, answer, again in zip(session.turns[:turn], answers, replaced, strict=True):
        if again:
            continue
        messages += [
            {"role": "user", "content": before.prompt},
            {"role": "assistant", "content": answer},
        ]
    messages.append({"role": "user", "content": asked.prompt})
    return "/v1/chat/completions", {**body, "messages": messages}


def _log_normal(rng: random.Random, median: float, sigma: float) -> int:
    return max(1, round(rng.lognormvariate(math.log(max(median, 1.0)), sigma)))
