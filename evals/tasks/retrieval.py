"""Facts to find in a document."""

import itertools
from collections.abc import Iterator

from adakv_serve.evals.samples import Sample, Turn
from adakv_serve.evals.tasks.source import Source
from adakv_serve.loadtest.traffic import corpus

_CITIES = (
    "Lisbon", "Oslo", "Cairo", "Lima", "Hanoi", "Quito", "Perth", "Turin", "Lagos", "Kyoto",
    "Davos", "Malmo", "Basel", "Porto", "Dakar", "Busan", "Leeds", "Miami", "Split", "Varna",
)  # fmt: skip
_NEEDLES, _ASKED = 8, 4
# Room for a question and the chat format.
_AROUND_TOKENS = 64
_PAIRS_OF_TOKENS = 14
_RECALLED_WORDS = 10


def needles(source: Source) -> Iterator[Sample]:
    """Yield novels with numbers of cities, and ask for one (RULER's single needles)."""
    for document in _documents(source):
        keys = source.rng.sample(_CITIES, _NEEDLES)
        facts = {key: _number(source) for key in keys}
        text = _hidden(source, [_fact(key, value) for key, value in facts.items()])
        for key in source.rng.sample(keys, _ASKED):
            turns = (Turn(_question(key), ""),)
            yield _asked("needles", document, key, text, turns, f" {facts[key]}", _cue(key))


def multi_value_needles(source: Source) -> Iterator[Sample]:
    """Yield novels with three numbers per city, and ask for all three in order (RULER)."""
    for document in _documents(source):
        keys = source.rng.sample(_CITIES, 3)
        facts = [(key, _number(source)) for _ in range(3) for key in keys]
        text = _hidden(source, [_fact(key, value) for key, value in facts])
        for key in keys:
            question = (
                f"The text tells three special numbers of {key}. Answer with the three numbers in "
                "the order in which the text tells them, separated by commas, and nothing else."
            )
            answer = " " + ", ".join(value for other, value in facts if other == key)
            cue = f"The three special numbers of {key} are"
            turns = (Turn(question, ""),)
            yield _asked("multi_value_needles", document, key, text, turns, answer, cue)


def multi_turn_needles(source: Source) -> Iterator[Sample]:
    """Yield conversations about one document, whose later questions follow its compression."""
    for document in _documents(source):
        keys = source.rng.sample(_CITIES, _NEEDLES)
        facts = {key: _number(source) for key in keys}
        text = _hidden(source, [_fact(key, value) for key, value in facts.items()])
        asked = source.rng.sample(keys, 3)
        for last in (1, 2):
            turns = tuple(Turn(_question(key), _fact(key, facts[key])) for key in asked[: last + 1])
            key = asked[last]
            answer, cue = f" {facts[key]}", _cue(key)
            yield _asked("multi_turn_needles", document, key, text, turns, answer, cue)


def key_values(source: Source) -> Iterator[Sample]:
    """Yield lists of keys and values, and ask for one value (RULER's multi-key needles)."""
    for document in _documents(source):
        count = max(8, (source.document_tokens - _AROUND_TOKENS) // _PAIRS_OF_TOKENS)
        pairs = {_word(source): _number(source) for _ in range(count)}
        text = "\n".join(f"{key}: {value}" for key, value in pairs.items())
        for key in source.rng.sample(sorted(pairs), _ASKED):
            question = f"What is the value of {key}? Answer with the number and nothing else."
            turns, answer = (Turn(question, ""),), f" {pairs[key]}"
            yield _asked("key_values", document, key, text, turns, answer, f"{key}:")


def recall(source: Source) -> Iterator[Sample]:
    """Yield novels, and ask for the words that follow a quotation."""
    passages = source.passages(corpus.novels())
    for document in _documents(source):
        text = passages.take(source.document_tokens - _AROUND_TOKENS)
        words = text.split(" ")
        places = range(_RECALLED_WORDS, len(words) - 2 * _RECALLED_WORDS)
        for place in source.rng.sample(places, _ASKED):
            before = " ".join(words[place - _RECALLED_WORDS : place])
            answer = " ".join(words[place : place + _RECALLED_WORDS])
            question = (
                f'In the text, which words follow directly after "{before}"? Answer with the next '
                f"{_RECALLED_WORDS} words and nothing else."
            )
            turns, cue = (Turn(question, ""),), f'"{before}'
            yield _asked("recall", document, str(place), text, turns, f" {answer}", cue)


def _documents(source: Source) -> Iterator[str]:
    return (f"document-{number}" for number in itertools.count())


def _asked(
    task: str,
    document: str,
    key: str,
    text: str,
    turns: tuple[Turn, ...],
    answer: str,
    cue: str,
) -> Sample:
    return Sample(task, f"{document}/{key}/{len(turns)}", document, text, turns, answer, cue)


def _fact(key: str, value: str) -> str:
    return f"{_cue(key)} {value}."


def _cue(key: str) -> str:
    return f"The special number of {key} is"


def _question(key: str) -> str:
    return f"What is the special number of {key}? Answer with the number and nothing else."


def _number(source: Source) -> str:
    return str(source.rng.randrange(100_000, 1_000_000))


def _word(source: Source) -> str:
    consonants, vowels = "bdfgklmnprstvz", "aeiou"
    return "".join(source.rng.choice(letters) for letters in (consonants, vowels) * 3)


def _hidden(source: Source, facts: list[str]) -> str:
    """Return a passage of a novel with the facts as sentences at random places."""
    taken = len(source.tokenizer.encode(" ".join(facts), add_special_tokens=False))
    tokens = max(64, source.document_tokens - _AROUND_TOKENS - taken)
    text = source.passages(corpus.novels()).take(tokens)
    sentences = text.replace("\n", " \n").split(". ")
    places = sorted(source.rng.choices(range(len(sentences)), k=len(facts)))
    for offset, (place, fact) in enumerate(zip(places, facts, strict=True)):
        sentences.insert(place + offset, fact.removesuffix("."))
    return ". ".join(sentences)
