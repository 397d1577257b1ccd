"""Sends the requests of a run, some at a time, judges each answer, and counts outcomes."""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from adakv_serve.loadtest.fuzzing.attempts import Attempt, Target, attempt
from adakv_serve.loadtest.fuzzing.exchange import End, Exchange, exchange
from adakv_serve.loadtest.fuzzing.verdicts import is_fixed_text, problem

_SHOWN_BYTES = 1500
# Bodies may have megabytes: later faults are counted only.
_MOST_KEPT = 200
# So many requests in a row without a connection end a run.
_MOST_UNCONNECTED = 200


class Judged(NamedTuple):
    """A request and what came back. problem: what is wrong with it, if anything."""

    attempt: Attempt
    found: Exchange
    problem: str | None

    def __str__(self) -> str:
        attempt = self.attempt
        sent = b" | ".join(attempt.sending.pieces)
        lines = [
            f"seed {attempt.seed} number {attempt.number} ({attempt.path}, "
            f"{', '.join(attempt.kinds)}): {self.problem or 'as it should be'}",
            f"  sent {_short(sent)}",
            f"  came {self.found.end} after {self.found.elapsed_s:.1f} s",
        ]
        lines += [
            f"  answer {answer.status} {_short(answer.body)}" for answer in self.found.answers
        ]
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        attempt = self.attempt
        return {
            "seed": attempt.seed, "number": attempt.number, "path": attempt.path,
            "kinds": attempt.kinds, "problem": self.problem, "end": self.found.end,
            "sent": _short(b"".join(attempt.sending.pieces)),
            "answers": [[answer.status, _short(answer.body)] for answer in self.found.answers],
        }  # fmt: skip


def _short(data: bytes) -> str:
    shown = repr(data[:_SHOWN_BYTES])[1:]
    return shown if len(data) <= _SHOWN_BYTES else f"{shown} ... of {len(data)} bytes"


def outcome(found: Exchange) -> str:
    """Return the statuses of an exchange's answers, or how it ended without one.

    A status of HAProxy's parser ends with `x`.
    """
    if not found.answers:
        return str(found.end)
    return "+".join(f"{one.status}{'x' if is_fixed_text(one) else ''}" for one in found.answers)


class Campaign:
    """Outcomes by kind and by path, and the first faults, of all requests so far.

    stopped: why it ended before its last request, or None.
    """

    def __init__(self, url: str, limit_s: float) -> None:
        """
        Args:
            limit_s: an answer that takes longer counts as a hang.
        """
        self._url = url
        self._limit_s = limit_s
        self.by_kind: dict[str, Counter[str]] = {}
        self.by_path: dict[str, Counter[str]] = {}
        self.faults: list[Judged] = []
        self.fault_count = 0
        self.stopped: str | None = None
        self._unconnected = 0

    async def send(
        self,
        target: Target,
        seed: int,
        numbers: Iterable[int],
        concurrency: int,
        on_done: Callable[[Judged], None] = lambda judged: None,
    ) -> None:
        """Send these requests of a seed, `concurrency` at a time, while it takes connections."""
        pending = iter(numbers)
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(concurrency) as pool:

            async def worker() -> None:
                for number in pending:
                    if self.stopped is not None:
                        return
                    made = attempt(seed, number, target)
                    judged = await loop.run_in_executor(pool, self._judge, made)
                    self._count(judged)
                    on_done(judged)

            await asyncio.gather(*(worker() for _ in range(concurrency)))

    def _judge(self, made: Attempt) -> Judged:
        try:
            found = exchange(self._url, made.sending, self._limit_s)
        except OSError as error:
            self._unconnected += 1
            if self._unconnected == _MOST_UNCONNECTED:
                self.stopped = f"stopped at request {made.number}: {error}"
            return Judged(made, Exchange((), End.CLOSED, 0.0), f"no connection: {error}")
        self._unconnected = 0
        return Judged(made, found, problem(made, found))

    def _count(self, judged: Judged) -> None:
        came = outcome(judged.found)
        self.by_kind.setdefault(judged.attempt.kinds[0], Counter())[came] += 1
        self.by_path.setdefault(judged.attempt.path, Counter())[came] += 1
        if judged.problem is not None:
            self.fault_count += 1
            if len(self.faults) < _MOST_KEPT:
                self.faults.append(judged)


def table(counts: dict[str, Counter[str]]) -> Iterator[str]:
    """Yield the lines of a table: a row for each name, a column for each outcome."""
    columns = sorted({column for counter in counts.values() for column in counter})
    width = max(map(len, counts), default=0)
    widths = [max(len(column), 5) for column in columns]
    heads = (column.rjust(size) for column, size in zip(columns, widths, strict=True))
    yield " ".join(("".ljust(width), *heads))
    for name in sorted(counts):
        cells = (
            str(counts[name][column] or ".").rjust(size)
            for column, size in zip(columns, widths, strict=True)
        )
        yield " ".join((name.ljust(width), *cells))
