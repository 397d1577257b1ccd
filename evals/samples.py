"""Samples, and their tokens."""

from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

# `aware`: the compressed prompt includes the first question. `agnostic`: the compressed prompt is
# the document alone, as for a cache that serves many questions.
Mode = Literal["aware", "agnostic"]
MODES: tuple[Mode, ...] = ("aware", "agnostic")


class Turn(NamedTuple):
    question: str
    answer: str


@dataclass(frozen=True)
class Sample:
    """Questions about a document; the last answer counts.

    cluster: name shared by samples whose outcomes depend on each other, as those of one document.
    turns: questions and answers; empty for a text to continue, which is no chat.
    cue: first words of the last answer, which keep small models to its form.
    answer: text after the cue, or continuation of the document.
    has_answer: whether `answer` is the right one, rather than a text to be faithful to.
    free_tokens: tokens that the model writes itself, with no forced answer; 0 to force `answer`.
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
    """Tokens of a sample.

    prompt: tokens that are prefilled and compressed.
    forced: tokens that follow.
    answer: index in `forced` at which the answer starts.
    """

    prompt: list[int]
    forced: list[int]
    answer: int

    @property
    def compressed(self) -> int:
        """Return the index in `forced` from which the compressed cache predicts tokens.

        The prefill predicts the first token.
        """
        return max(1, self.answer)


def tokenize(sample: Sample, tokenizer: Any, mode: Mode) -> Tokens:
    """Return the tokens of a sample, the same in both modes; only the prompt's end differs."""
    answer = _ids(tokenizer, sample.answer)
    if not sample.turns:
        # A server adds special tokens to a text that is no chat.
        return Tokens(tokenizer.encode(sample.document), answer, 0)
    text = chat_text(sample, tokenizer)
    edge = text.index(sample.document) + len(sample.document)
    if mode == "aware":
        edge = _end_of_first_question(sample, tokenizer, text)
    # Encoded as a whole, as a server does; a token across the edge belongs to the second part.
    coded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    begin = sum(end <= edge for _, end in coded["offset_mapping"])
    prompt, asked = coded["input_ids"][:begin], coded["input_ids"][begin:]
    return Tokens(prompt, [*asked, *answer], len(asked))


def messages(sample: Sample) -> list[dict[str, str]]:
    """Return the conversation before the last answer, without its cue."""
    conversation: list[dict[str, str]] = []
    for number, turn in enumerate(sample.turns):
        content = turn.question if number else f"{sample.document}\n\n{turn.question}"
        conversation.append({"role": "user", "content": content})
        if number < len(sample.turns) - 1:
            conversation.append({"role": "assistant", "content": turn.answer})
    return conversation


def chat_text(sample: Sample, tokenizer: Any) -> str:
    """Return the conversation in the model's chat format, up to the answer after its cue."""
    asked = tokenizer.apply_chat_template(
        messages(sample), tokenize=False, add_generation_prompt=True
    )
    return asked + sample.cue


def _end_of_first_question(sample: Sample, tokenizer: Any, text: str) -> int:
    if len(sample.turns) == 1:
        return len(text)
    first = chat_text(replace(sample, turns=sample.turns[:1], cue=""), tokenizer)
    assert text.startswith(first), "the chat format changes what came before"
    return len(first)


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False) if text else []
