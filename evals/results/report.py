"""Tables of results in Markdown."""

import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence

from adakv_serve.evals.choice import FULL
from adakv_serve.evals.policies import TWINS
from adakv_serve.evals.results.scores import Row, difference

_MEASURES = ("exact", "agreement", "kl")


def report(rows: Sequence[Row], baseline: str | None = None) -> str:
    """Return tables for each model, mode and length: policies by kept entries, means over tasks.

    Policies with adaptive heads are compared with the same policies with uniform heads, on the
    same samples, by exact answers and KL or by the published score.

    Args:
        baseline: another policy that all are compared with.
    """
    parts = []
    for key in dict.fromkeys((row.model, row.mode, row.document_tokens) for row in rows):
        mine = [row for row in rows if (row.model, row.mode, row.document_tokens) == key]
        model, mode, tokens = key
        parts.append(f"## {model}, {mode}, documents of {tokens} tokens\n\n{_summary(mine)}")
        parts += [f"### {task}\n\n{_table(rows_of)}" for task, rows_of in _by_task(mine)]
        parts.append(f"### Best at equal memory\n\n{_best(mine)}")
        parts += _compared("even heads'", mine, TWINS)
        if baseline is not None:
            others = {row.policy: baseline for row in mine if row.policy != FULL}
            parts += _compared(f"{baseline}'s", mine, others)
    return "\n\n".join(parts) + "\n"


def _by_task(rows: Iterable[Row]) -> list[tuple[str, list[Row]]]:
    tasks: dict[str, list[Row]] = {}
    for row in rows:
        tasks.setdefault(row.task, []).append(row)
    return list(tasks.items())


def _summary(rows: Sequence[Row]) -> str:
    """Return a table of means over the tasks."""
    samples = sum(one[0].n for _, one in _by_task(rows))
    tasks = ", ".join(task for task, _ in _by_task(rows))
    lines = [f"Mean of {tasks}; {samples} samples.", _table(rows)]
    lines += [
        f"Answered with the full cache: {row.policy} {row.kept}, {row.task}, "
        f"{row.not_compressed} of {row.n}."
        for row in rows
        if row.not_compressed
    ]
    return "\n\n".join(lines)


def _table(rows: Sequence[Row]) -> str:
    kepts = list(dict.fromkeys(row.kept for row in rows))
    cells: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        cells.setdefault((row.policy, row.kept), []).append(row)
    published = all(row.metric is not None for row in rows)
    title, measures = ("score", ("metric",)) if published else (" / ".join(_MEASURES), _MEASURES)
    lines = [_line([title, *kepts]), _line(["---"] * (len(kepts) + 1))]
    for policy in dict.fromkeys(row.policy for row in rows):
        lines.append(
            _line([policy, *(_cell(cells.get((policy, kept), []), measures) for kept in kepts)])
        )
    return "\n".join(lines)


def _best(rows: Sequence[Row]) -> str:
    """Return a table of the policy with the least KL or highest score per task and budget."""
    kepts = list(dict.fromkeys(row.kept for row in rows if row.policy != FULL))
    lines = [_line(["", *kepts]), _line(["---"] * (len(kepts) + 1))]
    for task, mine in _by_task(rows):
        tried = [row for row in mine if row.policy != FULL]
        lines.append(
            _line([task, *(_winner([row for row in tried if row.kept == kept]) for kept in kepts)])
        )
    return "\n".join(lines)


def _winner(rows: Sequence[Row]) -> str:
    """Return the best policy and its KL or score."""
    losses = [(row.kl, row.policy) for row in rows if row.kl is not None]
    scores = [(row.metric, row.policy) for row in rows if row.metric is not None]
    if not (losses or scores):
        return ""
    value, policy = min(losses) if losses else max(scores)
    return f"{policy} {value:.3f}"


def _cell(rows: Sequence[Row], measures: Sequence[str]) -> str:
    if not rows:
        return ""
    means = []
    for measure in measures:
        values = [value for row in rows if (value := getattr(row, measure)) is not None]
        means.append(f"{statistics.fmean(values):.3f}" if values else "-")
    return " / ".join(means)


def _compared(whose: str, rows: Sequence[Row], baselines: Mapping[str, str]) -> list[str]:
    """Return a table for each measure: policies against their baselines."""
    parts = []
    for title, measure in (("Exact", "exact"), ("KL", "kl"), ("Score", "metric")):
        some = [row for row in rows if getattr(row, measure) is not None]
        if lines := _against(some, baselines, measure):
            parts.append(f"### {title} less {whose}\n\n" + "\n".join(lines))
    return parts


def _against(rows: Sequence[Row], baselines: Mapping[str, str], measure: str) -> list[str]:
    """Return lines of paired differences over all tasks; clear ones are bold."""
    kepts = list(dict.fromkeys(row.kept for row in rows if row.kept != "all"))
    measured = {row.policy for row in rows}
    lines = []
    for policy, baseline in baselines.items():
        if policy != baseline and {policy, baseline} <= measured:
            cells = [_paired(rows, policy, baseline, kept, measure) for kept in kepts]
            lines.append(_line([policy, *cells]))
    return [_line(["", *kepts]), _line(["---"] * (len(kepts) + 1)), *lines] if lines else []


def _paired(rows: Sequence[Row], policy: str, baseline: str, kept: str, measure: str) -> str:
    ours, theirs = _merged(rows, policy, kept), _merged(rows, baseline, kept)
    if ours is None or theirs is None:
        return ""
    common = _measured(ours, measure) & _measured(theirs, measure)
    if not common:
        return ""
    found = difference(_only(ours, common), _only(theirs, common), measure)
    text = f"{found.mean:+.3f} [{found.interval.low:+.3f}, {found.interval.high:+.3f}]"
    return f"**{text}**" if found.is_clear else text


def _measured(row: Row, measure: str) -> set[str]:
    """Return the samples that have a measure."""
    return {one["sample_id"] for one in row.samples if one[measure] is not None}


def _only(row: Row, sample_ids: Collection[str]) -> Row:
    """Return a row of these samples alone: another run may have had fewer, or other tasks."""
    mine = [one for one in row.samples if one["sample_id"] in sample_ids]
    samples = sorted(mine, key=lambda one: str(one["sample_id"]))
    return Row(**{**row.as_dict(), "samples": samples})


def _merged(rows: Sequence[Row], policy: str, kept: str) -> Row | None:
    """Return one cell's samples of all tasks as one row, with clusters named by task."""
    mine = [row for row in rows if (row.policy, row.kept) == (policy, kept)]
    if not mine:
        return None
    samples = [
        {
            **sample,
            "cluster": f"{row.task}/{sample['cluster']}",
            "sample_id": f"{row.task}/{sample['sample_id']}",
        }
        for row in mine
        for sample in row.samples
    ]
    return Row(**{**mine[0].as_dict(), "samples": samples})


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
