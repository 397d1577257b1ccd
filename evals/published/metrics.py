"""Scores from 0 to 1, as LongBench's and RULER's own programs give them."""

import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_NO_CODE = ("`", "#", "//")


def f1(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Of words, without articles and punctuation, whatever their order."""
    ours, theirs = (_words(text) for text in (prediction, answer))
    common = sum((Counter(ours) & Counter(theirs)).values())
    if common == 0:
        return 0.0
    precision, recall = common / len(ours), common / len(theirs)
    return 2 * precision * recall / (precision + recall)


def _words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split()


def rouge_l(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """The F-score of the package `rouge`, which differs from others' in how it takes sentences."""
    from rouge import Rouge

    try:
        return float(Rouge().get_scores([prediction], [answer], avg=True)["rouge-l"]["f"])
    except ValueError:  # One of them has no words.
        return 0.0


def named_class(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Whether the class is named; if others are, too, its share of them."""
    named = [one for one in classes if one in prediction]
    # LongBench leaves out the one that follows one that it takes out.
    place = 0
    while place < len(named):
        if named[place] in answer and named[place] != answer:
            del named[place]
        place += 1
    return 1 / len(named) if answer in named else 0.0


def paragraph(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """The share of the numbers in the prediction that are that of "Paragraph 7"."""
    (number, *_) = re.findall(r"Paragraph (\d+)", answer)
    return count(prediction, number)


def count(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """The share of the numbers in the prediction that are the answer."""
    numbers = re.findall(r"\d+", prediction)
    return numbers.count(str(answer)) / len(numbers) if numbers else 0.0


def edit_similarity(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Of the prediction's first line of code, in whole hundredths."""
    from rapidfuzz.fuzz import ratio

    lines = prediction.lstrip("\n").split("\n")
    code = (line for line in lines if not any(mark in line for mark in _NO_CODE))
    return round(ratio(next(code, ""), answer)) / 100


def all_of(prediction: str, answers: Sequence[str]) -> float:
    """RULER: the share of the answers that are somewhere in the prediction."""
    return sum(answer.lower() in prediction.lower() for answer in answers) / len(answers)


def any_of(prediction: str, answers: Sequence[str]) -> float:
    """RULER's for questions: whether one of the answers is."""
    return float(any(answer.lower() in prediction.lower() for answer in answers))
