"""What published sets ask, whatever their file format."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evals.samples import Mode


@dataclass(frozen=True)
class Question:
    """
    document: the prompt's first part, which is compressed alone in the mode `agnostic`.
    rest: what follows it. prefix: how the answer is to begin.
    in_chat: whether it is put into the model's chat format.
    one_line: whether the answer ends with its line.
    may_shorten: whether a prompt that is too long loses its middle; else it is refused.
    score: of an answer's text, 0 to 1.
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
        """The same for all questions about a document."""
        return hashlib.sha256(self.document.encode()).hexdigest()[:16]

    def prompt(
        self, tokenizer: Any, context_tokens: int, mode: Mode
    ) -> tuple[list[int], list[int]]:
        """What is prefilled and compressed, and what follows before the answer.

        A longer one loses its middle, as in LongBench. Then both modes compress all of it but what
        was behind the document.

        Raises:
            ValueError: it must not be shortened, and is too long; or the chat format changes it.
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


# What a chat format may add.
_ROOM_TOKENS = 64


def _edge_in_chat(chat: str, text: str, edge: int) -> int:
    # Some chat formats take the space around a message away.
    bare = text.strip()
    if (begin := chat.find(bare)) < 0:
        raise ValueError("the model's chat format changes the prompt")
    return begin + min(max(0, edge - text.index(bare)), len(bare))


def _shortened(question: Question, tokenizer: Any, room_tokens: int) -> tuple[str, int]:
    """The prompt, and where in it the document ends."""
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
    """Rows of a JSON Lines file.

    Raises:
        ValueError: a row is not JSON, or lacks a field; names file and line.
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
