"""Texts to continue or summarize: the full cache's answer is the reference."""

import itertools
from collections.abc import Iterator

from adakv_serve.evals.samples import Sample, Turn
from adakv_serve.evals.tasks.source import Source
from adakv_serve.loadtest.traffic import corpus

_CONTINUED_TOKENS = 32
_SUMMARY_TOKENS = 64
# Room for a question and the chat format.
_AROUND_TOKENS = 64


def continuation(source: Source) -> Iterator[Sample]:
    """Yield passages of novels to continue."""
    yield from _continued(source, "continuation", corpus.novels())


def code_next_lines(source: Source) -> Iterator[Sample]:
    """Yield modules of a library to continue, after LCC and RepoBench."""
    yield from _continued(source, "code", corpus.code())


def summaries(source: Source) -> Iterator[Sample]:
    """Yield passages to summarize (LongBench), scored against the full cache's summary."""
    passages = source.passages(corpus.novels())
    for number in itertools.count():
        name = f"summaries-{number}"
        turns = (Turn("Tell in a few sentences what happens in this passage of a novel.", ""),)
        yield Sample(
            "summaries",
            name,
            name,
            passages.take(source.document_tokens - _AROUND_TOKENS),
            turns,
            "",
            has_answer=False,
            free_tokens=_SUMMARY_TOKENS,
        )


def _continued(source: Source, task: str, text: str) -> Iterator[Sample]:
    passages = source.passages(text)
    for number in itertools.count():
        ids = source.tokenizer.encode(
            passages.take(source.document_tokens + _CONTINUED_TOKENS), add_special_tokens=False
        )
        begin, end = ids[: source.document_tokens], ids[source.document_tokens :]
        yield Sample(
            task,
            f"{task}-{number}",
            f"{task}-{number}",
            source.tokenizer.decode(begin),
            (),
            source.tokenizer.decode(end[:_CONTINUED_TOKENS]),
            has_answer=False,
        )
