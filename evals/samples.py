"""What is asked, and how it becomes tokens."""

from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

# `aware`: the first question is part of the prompt that is compressed. `agnostic`: the document is
# compressed alone, as where one cache serves many questions.
Mode = Literal["aware", "agnostic"]
MODES: tuple[Mode, ...] = ("aware", "agnostic")


class Turn(NamedTuple):
    question: str
    answer: str


@dataclass(frozen=True)
class Sample:
    """Questions about a document, of which the last one's answer counts.

    cluster: shared by samples whose outcomes hang together, as those of one document.
    turns: empty for a text that is to be gone on with, which is no chat.
    cue: how the last answer begins, in the assistant's own words, so that small models keep to it.
    answer: what follows the cue, or the text's continuation.
    has_answer: whether the answer is right or wrong; else it is a text to be faithful to.
    free_tokens: if set, no answer is forced: the model says so many tokens of its own.
    """

    task: str
    sample_id: str
    cluster: str
    document: str
    turns: tuple[Turn, ...]
    answer: str
    cue: str = ""
    has_answer: bool = True
    free_tokens: int = 0


class Tokens(NamedTuple):
    """prompt: what is prefilled, and compressed.

    forced: what follows, whatever the model would say.
    answer: from this one on they are the answer.
    """

    prompt: list[int]
    forced: list[int]
    answer: int

    @property
    def compressed(self) -> int:
        """From this one on they come from the compressed cache: the first is the prefill's own."""
        return max(1, self.answer)


def tokenize(sample: Sample, tokenizer: Any, mode: Mode) -> Tokens:
    """The same tokens in the same order in both modes; only where the prompt ends differs."""
    answer = _ids(tokenizer, sample.answer)
    if not sample.turns:
        # As a server begins a text that is no chat.
        return Tokens(tokenizer.encode(sample.document), answer, 0)
    text = _chat(sample, tokenizer)
    edge = text.index(sample.document) + len(sample.document)
    if mode == "aware":
        edge = _end_of_first_question(sample, tokenizer, text)
    # As a whole, as a server does it; a token across the edge comes after it.
    coded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    begin = sum(end <= edge for _, end in coded["offset_mapping"])
    prompt, asked = coded["input_ids"][:begin], coded["input_ids"][begin:]
    return Tokens(prompt, [*asked, *answer], len(asked))


def messages(sample: Sample) -> list[dict[str, str]]:
    """The conversation up to where the last answer begins, its cue left out."""
    told: list[dict[str, str]] = []
    for number, turn in enumerate(sample.turns):
        content = turn.question if number else f"{sample.document}\n\n{turn.question}"
        told.append({"role": "user", "content": content})
        if number < len(sample.turns) - 1:
            told.append({"role": "assistant", "content": turn.answer})
    return told


def _chat(sample: Sample, tokenizer: Any) -> str:
    asked = tokenizer.apply_chat_template(
        messages(sample), tokenize=False, add_generation_prompt=True
    )
    return asked + sample.cue


def _end_of_first_question(sample: Sample, tokenizer: Any, text: str) -> int:
    # What an assistant is to say next begins behind it.
    if len(sample.turns) == 1:
        return len(text)
    first = _chat(replace(sample, turns=sample.turns[:1], cue=""), tokenizer)
    assert text.startswith(first), "the chat format changes what came before"
    return len(first)


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False) if text else []
