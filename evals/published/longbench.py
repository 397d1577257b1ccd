"""LongBench's 16 English and code sets, scored by Ada-KV's protocol.

They are read from a folder with `data/<set>.jsonl`, `config/dataset2prompt.json` and
`config/dataset2maxlen.json`, as published. An answer's score is its best over the right answers.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from adakv_serve.evals.published import metrics
from adakv_serve.evals.published.questions import Question, read_lines


class _Set(NamedTuple):
    metric: Callable[[str, str, Sequence[str]], float]
    in_chat: bool = True
    one_line: bool = False


SETS = {
    "narrativeqa": _Set(metrics.f1),
    "qasper": _Set(metrics.f1),
    "multifieldqa_en": _Set(metrics.f1),
    "hotpotqa": _Set(metrics.f1),
    "2wikimqa": _Set(metrics.f1),
    "musique": _Set(metrics.f1),
    "gov_report": _Set(metrics.rouge_l),
    "qmsum": _Set(metrics.rouge_l),
    "multi_news": _Set(metrics.rouge_l),
    "trec": _Set(metrics.named_class, in_chat=False, one_line=True),
    "triviaqa": _Set(metrics.f1, in_chat=False, one_line=True),
    "samsum": _Set(metrics.rouge_l, in_chat=False, one_line=True),
    "passage_count": _Set(metrics.count),
    "passage_retrieval_en": _Set(metrics.paragraph),
    "lcc": _Set(metrics.edit_similarity, in_chat=False),
    "repobench-p": _Set(metrics.edit_similarity, in_chat=False),
}
_CONTEXT = "{context}"


def read_longbench(folder: Path, sets: Sequence[str] | None = None) -> Iterator[Question]:
    """Yield the questions of `sets`, or of all sets that have a file.

    Raises:
        OSError: a file cannot be read.
        ValueError: a set is unknown, or a file is not as published.
    """
    prompts, lengths = (
        json.loads((folder / "config" / f"dataset2{name}.json").read_text(encoding="utf-8"))
        for name in ("prompt", "maxlen")
    )
    found = [name for name in SETS if (folder / "data" / f"{name}.jsonl").is_file()]
    if unknown := set(sets or ()) - SETS.keys():
        raise ValueError(f"unknown sets {', '.join(sorted(unknown))}: known are {', '.join(SETS)}")
    if not (sets or found):
        raise ValueError(f"{folder / 'data'} has none of LongBench's sets")
    for name in sets or found:
        if name not in prompts or name not in lengths:
            raise ValueError(f"{folder / 'config'} has no prompt or length for {name}")
        rows = read_lines(folder / "data" / f"{name}.jsonl", ("input", "context", "answers"))
        for number, row in enumerate(rows):
            yield _question(name, number, row, prompts[name], int(lengths[name]))


def _question(
    name: str, number: int, row: dict[str, Any], prompt: str, max_tokens: int
) -> Question:
    kind = SETS[name]
    before, _, after = prompt.partition(_CONTEXT)
    classes = row.get("all_classes") or ()

    def score(answer: str) -> float:
        return max(kind.metric(answer, right, classes) for right in row["answers"])

    return Question(
        name,
        str(row.get("_id", number)),
        before.format(**row) + row["context"],
        after.format(**row),
        max_tokens,
        score,
        in_chat=kind.in_chat,
        one_line=kind.one_line,
    )
