"""The record of each request of a load test, and the figures of all records."""

import json
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from adakv_serve.loadtest.client.stream import StreamedAnswer


@dataclass
class Record:
    """One request. Times are in seconds.

    at_s: when it was sent, from the start of the test.
    late_s: how much later than planned, in an open loop.
    ttft_s: to the first text. tpot_s: for each token after the first. itl_s: from text to text.
    error: why it failed or was cut, else None.
    """

    session: str
    turn: int
    at_s: float
    late_s: float = 0.0
    ttft_s: float | None = None
    tpot_s: float | None = None
    itl_s: list[float] = field(default_factory=list)
    e2e_s: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    replica: str | None = None
    kv_compression: dict[str, Any] | None = None
    error: str | None = None

    def take(self, answer: StreamedAnswer, e2e_s: float) -> None:
        """Copy times, counts and the proof from an answer that has ended after `e2e_s`."""
        self.e2e_s = _rounded(e2e_s)
        self.ttft_s = None if answer.ttft_s is None else _rounded(answer.ttft_s)
        self.tpot_s = None if answer.tpot_s is None else _rounded(answer.tpot_s)
        self.itl_s = list(map(_rounded, answer.itl_s))
        self.prompt_tokens, self.output_tokens = answer.prompt_tokens, answer.output_tokens
        self.cached_tokens, self.kv_compression = answer.cached_tokens, answer.proof

    def line(self) -> str:
        """Return the record as a line of JSON."""
        return json.dumps(asdict(self))


def _rounded(seconds: float) -> float:
    return round(seconds, 5)


def read_records(path: Path) -> list[Record]:
    """Read the records of a JSONL file.

    Raises:
        ValueError, TypeError: a line is no record.
        OSError: it cannot be read.
    """
    return [Record(**json.loads(line)) for line in path.read_text().splitlines()]


@dataclass(frozen=True)
class Limits:
    """The limits within which a request counts for goodput; None is no limit."""

    ttft_s: float | None = None
    tpot_s: float | None = None

    def met_by(self, record: Record) -> bool:
        """Return whether a request succeeded within all limits."""
        pairs = ((record.ttft_s, self.ttft_s), (record.tpot_s, self.tpot_s))
        return record.error is None and all(
            limit is None or (value is not None and value <= limit) for value, limit in pairs
        )


def summary(records: Sequence[Record], limits: Limits | None = None) -> dict[str, Any]:
    """Return the figures of a test, with rates from the first sending to the last end."""
    done = [record for record in records if record.error is None]
    began = min((record.at_s for record in records), default=0.0)
    ended = max((record.at_s + record.e2e_s for record in records), default=0.0)
    elapsed = max(ended - began, 1e-9)
    output_tokens = sum(record.output_tokens for record in done)
    figures: dict[str, Any] = {
        "requests": len(records),
        "failures": dict(Counter(record.error for record in records if record.error)),
        "elapsed_s": round(elapsed, 3),
        "prompt_tokens": sum(record.prompt_tokens for record in done),
        "prefix_hit_tokens": sum(record.cached_tokens for record in done),
        "computed_prompt_tokens": sum(
            record.prompt_tokens - record.cached_tokens for record in done
        ),
        "output_tokens": output_tokens,
        "tokens_per_s": round(output_tokens / elapsed, 3),
        "requests_per_s": round(len(done) / elapsed, 4),
        "late_p95_s": percentile((record.late_s for record in records), 0.95),
        "compressed": sum(
            record.kv_compression is not None and record.kv_compression["skipped"] is None
            for record in done
        ),
    }
    for name in ("ttft_s", "tpot_s", "e2e_s"):
        values = [value for record in done if (value := getattr(record, name)) is not None]
        figures |= _percentiles(name, values)
    figures |= _percentiles("itl_s", [gap for record in done for gap in record.itl_s])
    if limits is not None:
        good = sum(limits.met_by(record) for record in records)
        figures["goodput_requests_per_s"] = round(good / elapsed, 4)
        figures["good_share"] = round(good / max(len(records), 1), 4)
    return figures


def percentile(values: Iterable[float], quantile: float) -> float | None:
    """Return the smallest value that at least this share does not exceed; None without values."""
    ordered = sorted(values)
    if not ordered:
        return None
    return round(ordered[max(0, math.ceil(quantile * len(ordered)) - 1)], 5)


def _percentiles(name: str, values: list[float]) -> dict[str, Any]:
    stem = name.removesuffix("_s")
    figures: dict[str, Any] = {
        f"{stem}_p{share}_s": percentile(values, share / 100) for share in (50, 95, 99)
    }
    figures[f"{stem}_mean_s"] = round(statistics.fmean(values), 5) if values else None
    return figures
