"""Questions of published sets, independent of file formats."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adakv_serve.evals.samples import Mode


@dataclass(frozen=True)
class Question:
    """One question of a published set.

    document: first part of the prompt, compressed alone in the mode `agnostic`.
    rest: remaining part of the prompt.
    score: function from an answer's text to its score, 0 to 1.
    prefix: first words of the answer.
    in_chat: whether to put the prompt into the model's chat format.
    one_line: whether only the first line of the answer counts.
    may_shorten: whether a prompt that is too long loses its middle instead of being refused.
    """

    task: str
    sample_id: str
    document: str
    rest: str
    max_tokens: int
    score: Callable[[str], float]
    prefix: str = ""
    in_chat: bool = True
    one_line: bool = False
    may_shorten: bool = True

    @property
    def cluster(self) -> str:
        """Return a name shared by all questions about the document."""
        return hashlib.sha256(self.document.encode()).hexdigest()[:16]

    def prompt(
        self, tokenizer: Any, context_tokens: int, mode: Mode
    ) -> tuple[list[int], list[int]]:
        """Return the compressed tokens and the tokens between them and the answer.

        A prompt that is too long loses its middle, as in LongBench.

        Raises:
            ValueError: the prompt is too long and must not be shortened, or the chat format changes
                its text.
        """
        text, edge = _shortened(self, tokenizer, context_tokens - self.max_tokens)
        if self.in_chat:
            asked = [{"role": "user", "content": text}]
            chat = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
            edge = _edge_in_chat(chat, text, edge)
            text = chat
        text += self.prefix
        coded = tokenizer(text, add_special_tokens=not self.in_chat, return_offsets_mapping=True)
        ids = coded["input_ids"]
        begin = len(ids)
        if mode == "agnostic":
            begin = sum(end <= edge for _, end in coded["offset_mapping"])
        return ids[:begin], ids[begin:]

    def rate(self, answer: str) -> float:
        return self.score(answer.lstrip("\n").split("\n")[0] if self.one_line else answer)


# Room for the tokens of a chat format.
_ROOM_TOKENS = 64


def _edge_in_chat(chat: str, text: str, edge: int) -> int:
    # Some chat formats strip a message.
    bare = text.strip()
    if (begin := chat.find(bare)) < 0:
        raise ValueError("the model's chat format changes the prompt")
    return begin + min(max(0, edge - text.index(bare)), len(bare))


def _shortened(question: Question, tokenizer: Any, room_tokens: int) -> tuple[str, int]:
    """Return the prompt and the position at which its document ends."""
    text = question.document + question.rest
    room = room_tokens - _ROOM_TOKENS
    ids = tokenizer.encode(text, add_special_tokens=False)
    if len(ids) <= room:
        return text, len(question.document)
    if not question.may_shorten:
        raise ValueError(
            f"{question.task} {question.sample_id} has {len(ids)} tokens and must not lose any: "
            f"--context-tokens {len(ids) + question.max_tokens + _ROOM_TOKENS} or more"
        )
    half = room // 2
    first, last = (tokenizer.decode(part) for part in (ids[:half], ids[-half:]))
    return first + last, max(len(first), len(first + last) - len(question.rest))


def read_lines(path: Path, needed: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield the rows of a JSON Lines file.

    Raises:
        ValueError: a row is not JSON or lacks a field; the message names file and line.
    """
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                missing = [name for name in needed if name not in row]
            except (ValueError, TypeError) as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
            if missing:
                raise ValueError(f"{path}, line {number}: no {', '.join(missing)}")
            yield row
