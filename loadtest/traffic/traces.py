"""Recorded traffic: when requests came, how long they were, which prefixes they shared."""

import functools
import random
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from adakv_serve.loadtest.traffic import corpus
from adakv_serve.loadtest.traffic.workloads import Passages, Session, Tokenizer, Turn

# Tokens for each hash of the Mooncake traces.
_MOONCAKE_BLOCK_TOKENS = 512


class _Row(BaseModel):
    """Our format. Prompts of one session are beginnings of one text."""

    model_config = ConfigDict(extra="ignore")

    at_s: float = Field(ge=0)
    prompt_tokens: int = Field(gt=0)
    output_tokens: int = Field(gt=0)
    session: str | None = None


class _MooncakeRow(BaseModel):
    """The format of kvcache-ai/Mooncake's traces: milliseconds, and a hash for 512 tokens each."""

    model_config = ConfigDict(extra="ignore")

    timestamp: float = Field(ge=0)
    input_length: int = Field(gt=0)
    output_length: int = Field(gt=0)
    hash_ids: list[int] = []


def read_trace(
    path: Path, tokenizer: Tokenizer, context_tokens: int, scale: float | None = None
) -> list[Session]:
    """Return the requests of a JSONL trace in order of time, one session each.

    Args:
        scale: factor on all lengths; None for 1, or less where the longest would not fit.

    Raises:
        ValueError: a line is in neither format, or there is none.
        OSError: the file cannot be read.
    """
    rows = [
        _parse(line, number)
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if line.strip()
    ]
    if not rows:
        raise ValueError(f"{path} holds no requests")
    longest = max(sum(_lengths(row)) for row in rows)
    factor = min(1.0, context_tokens / longest) if scale is None else scale
    text = _Texts(tokenizer, factor)
    replayed = []
    for number, row in enumerate(rows):
        prompt_tokens, output_tokens = (max(1, int(length * factor)) for length in _lengths(row))
        output_tokens = min(output_tokens, context_tokens - 1)
        prompt_tokens = min(prompt_tokens, context_tokens - output_tokens)
        if isinstance(row, _MooncakeRow):
            at_s, ids = row.timestamp / 1000, text.of_hashes(row.hash_ids)
        else:
            at_s, ids = row.at_s, text.of_session(row.session or f"row {number}", prompt_tokens)
        if len(ids) < prompt_tokens:
            # The hashes may cover less than the prompt.
            ids = ids + text.take(f"filler {number}", prompt_tokens - len(ids))
        turn = Turn(ids[:prompt_tokens], output_tokens)
        replayed.append(Session(f"trace-{number}", (turn,), chat=False, at_s=at_s))
    return sorted(replayed, key=lambda session: session.at_s or 0.0)


def _parse(line: str, number: int) -> _Row | _MooncakeRow:
    kind: type[_Row] | type[_MooncakeRow] = _MooncakeRow if '"input_length"' in line else _Row
    try:
        return kind.model_validate_json(line)
    except ValidationError as error:
        detail = error.errors()[0]
        where = ".".join(map(str, detail["loc"])) or "the line"
        raise ValueError(f"line {number} of the trace: {where}: {detail['msg']}") from None


def _lengths(row: _Row | _MooncakeRow) -> tuple[int, int]:
    if isinstance(row, _MooncakeRow):
        return row.input_length, row.output_length
    return row.prompt_tokens, row.output_tokens


class _Texts:
    """Token ids that are the same for equal names."""

    def __init__(self, tokenizer: Tokenizer, factor: float) -> None:
        self._tokenizer = tokenizer
        self._block_tokens = max(1, int(_MOONCAKE_BLOCK_TOKENS * factor))
        self._of_hash = functools.lru_cache(4096)(self._block)
        self._sessions: dict[str, list[int]] = {}

    def of_hashes(self, hash_ids: list[int]) -> list[int]:
        return [token for hash_id in hash_ids for token in self._of_hash(hash_id)]

    def of_session(self, session: str, tokens: int) -> list[int]:
        known = self._sessions.get(session, [])
        if len(known) < tokens:
            # A session grows by another stretch, so that earlier prompts stay its beginning.
            known = known + self.take(f"{session} {len(known)}", tokens - len(known))
            self._sessions[session] = known
        return known[:tokens]

    def take(self, name: str, tokens: int) -> list[int]:
        return Passages(corpus.novels(), self._tokenizer, random.Random(name)).take(tokens)

    def _block(self, hash_id: int) -> list[int]:
        return self.take(f"block {hash_id}", self._block_tokens)
