"""Scores from 0 to 1, equal to those of LongBench's and RULER's programs."""

import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_NO_CODE = ("`", "#", "//")


def f1(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Return the F1 score of words without articles and punctuation, in any order."""
    ours, theirs = (_words(text) for text in (prediction, answer))
    common = sum((Counter(ours) & Counter(theirs)).values())
    if common == 0:
        return 0.0
    precision, recall = common / len(ours), common / len(theirs)
    return 2 * precision * recall / (precision + recall)


def _words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split()


def rouge_l(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Return ROUGE-L of the package `rouge`, which splits sentences in its own way."""
    from rouge import Rouge

    try:
        return float(Rouge().get_scores([prediction], [answer], avg=True)["rouge-l"]["f"])
    except ValueError:  # A text has no words.
        return 0.0


def named_class(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Return 1 / n if the prediction names the right class among n, else 0."""
    named = [one for one in classes if one in prediction]
    # LongBench deletes while it iterates, and so skips the class after a deleted one.
    place = 0
    while place < len(named):
        if named[place] in answer and named[place] != answer:
            del named[place]
        place += 1
    return 1 / len(named) if answer in named else 0.0


def paragraph(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Return the share of the prediction's numbers that are n of the answer "Paragraph n"."""
    (number, *_) = re.findall(r"Paragraph (\d+)", answer)
    return count(prediction, number)


def count(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Return the share of the prediction's numbers that are the answer."""
    numbers = re.findall(r"\d+", prediction)
    return numbers.count(str(answer)) / len(numbers) if numbers else 0.0


def edit_similarity(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Return the similarity of the prediction's first line of code, in whole hundredths."""
    from rapidfuzz.fuzz import ratio

    lines = prediction.lstrip("\n").split("\n")
    code = (line for line in lines if not any(mark in line for mark in _NO_CODE))
    return round(ratio(next(code, ""), answer)) / 100


def all_of(prediction: str, answers: Sequence[str]) -> float:
    """Return the share of the answers that the prediction contains (RULER)."""
    return sum(answer.lower() in prediction.lower() for answer in answers) / len(answers)


def any_of(prediction: str, answers: Sequence[str]) -> float:
    """Return 1 if the prediction contains one of the answers, else 0 (RULER's questions)."""
    return float(any(answer.lower() in prediction.lower() for answer in answers))
