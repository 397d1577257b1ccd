"""Long answers with evictions while decoding, against the full cache's own answers."""

from collections.abc import Iterator, Sequence
from itertools import islice

from adakv_serve.evals.answering import Answering
from adakv_serve.evals.choice import FULL, Choice
from adakv_serve.evals.results.scores import Row, Score, row, score
from adakv_serve.evals.samples import Sample, Tokens, Turn, messages
from adakv_serve.evals.tasks.source import Source
from adakv_serve.loadtest.traffic import corpus

TASK = "generation"
_WISHES = (
    "Continue this text as a long story. Do not stop early.",
    "Explain this text step by step, sentence by sentence, at great length.",
    "Write a long letter to a friend that tells of this text in every detail.",
    "Discuss this text from as many sides as you can, one paragraph for each.",
)


def requests(source: Source, passage_tokens: int = 160) -> Iterator[Sample]:
    """Yield passages of novels, each with something long to write about it."""
    passages = source.passages(corpus.novels())
    for number in range(1 << 30):
        text = passages.take(passage_tokens)
        turns = (Turn(_WISHES[number % len(_WISHES)], ""),)
        name = f"passage-{number}"
        yield Sample(TASK, name, name, text, turns, "", has_answer=False)


def run_generation(
    engine: Answering,
    model: str,
    source: Source,
    choices: Sequence[Choice],
    count: int,
    answer_tokens: int,
) -> Iterator[list[Row]]:
    """Yield the rows of all choices, the full cache's first, after each passage.

    The forced answer is the one that the model gives greedily with the full cache.
    """
    every = [Choice(FULL), *choices]
    scores: dict[Choice, list[Score]] = {choice: [] for choice in every}
    for sample in islice(requests(source), count):
        prompt = engine.tokenizer.apply_chat_template(
            messages(sample), add_generation_prompt=True, return_dict=False
        )
        own = engine.answers(prompt, [], answer_tokens, [Choice(FULL)])[Choice(FULL)].predicted
        if len(own) < 2:
            continue
        tokens = Tokens(prompt, own, 0)
        for choice, outcome in engine.outcomes(sample, tokens, every).items():
            scores[choice].append(score(sample, tokens, outcome))
        yield [row(TASK, "aware", model, answer_tokens, choice, scores[choice]) for choice in every]
