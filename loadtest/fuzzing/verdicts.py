"""What is wrong with an answer, if anything."""

import itertools
import json
import re
from collections.abc import Iterator
from typing import Any

from adakv_serve.loadtest.fuzzing.attempts import Attempt
from adakv_serve.loadtest.fuzzing.exchange import Answer, End, Exchange

_FIXED_TEXT = re.compile(rb"<html><body><h1>4\d\d ")
# Streams end with one of these events, or with an error.
_LAST_TYPES = ("message_stop", "response.completed", "response.incomplete", "response.failed")


def problem(attempt: Attempt, found: Exchange) -> str | None:
    """Return what the deployment did wrong, or None."""
    sending = attempt.sending
    methods = itertools.chain(sending.owed or (sending.method,), itertools.repeat(""))
    for answer, method in zip(found.answers, methods, strict=False):
        if wrong := _wrong(answer, is_head=method == "HEAD"):
            return wrong
    if found.end == End.HUNG:
        return f"no answer within {found.elapsed_s:.0f} s"
    # A parser that has refused something reads nothing more, and does not know the method.
    refused = any(map(_is_of_a_parser, found.answers))
    if found.end == End.CUT and not refused:
        return "the connection was cut inside an answer"
    if found.end == End.CLOSED and sending.owed and not refused:
        return "the connection was closed without an answer"
    return None


def _is_of_a_parser(answer: Answer) -> bool:
    """Return whether an answer is to what is no HTTP, and so to no request."""
    own = answer.status in (400, 422) and "x-request-id" not in answer.headers
    return own or is_fixed_text(answer)


def _wrong(answer: Answer, is_head: bool) -> str | None:
    if answer.status == 503:
        return _wrong_503(answer, is_head)
    if answer.status >= 500:
        return f"status {answer.status}"
    if is_head or answer.status in (204, 304):
        return None
    if answer.status >= 400:
        return _wrong_error(answer)
    kind = answer.headers.get("content-type", "")
    if kind.startswith("text/event-stream"):
        return _wrong_stream(answer.body)
    if kind.startswith("application/json") and parsed(answer.body) is None:
        return f"the body of status {answer.status} is no JSON"
    return None


def _wrong_503(answer: Answer, is_head: bool) -> str | None:
    if "retry-after" not in answer.headers:
        return "status 503 without Retry-After"
    if wrong := None if is_head else _wrong_error(answer):
        return wrong
    if b"ReplicaLost" in answer.body:
        return "the replica died"
    return None


def _wrong_error(answer: Answer) -> str | None:
    if _is_error(parsed(answer.body)):
        return None
    if is_fixed_text(answer):
        return None
    return f"the error of status {answer.status} is not in OpenAI's form"


def is_fixed_text(answer: Answer) -> bool:
    """Return whether HAProxy's parser refused the request: no setting changes those texts."""
    # All that comes from the application has a request id.
    return "x-request-id" not in answer.headers and bool(_FIXED_TEXT.match(answer.body))


def _is_error(body: Any) -> bool:
    """Return whether it is an error object of OpenAI's API or of Anthropic's."""
    error = body.get("error") if isinstance(body, dict) else None
    return isinstance(error, dict) and all(
        isinstance(error.get(name), str) for name in ("message", "type")
    )


def _wrong_stream(body: bytes) -> str | None:
    last: Any = None
    for event in _events(body):
        last = event
        error = event.get("error") if isinstance(event, dict) else None
        if error is None:
            continue
        if not _is_error(event):
            return "the error in a stream is not in OpenAI's form"
        code = error.get("code")
        if (isinstance(code, int) and code >= 500) or "internal" in error["type"].lower():
            return f"error {code} in a stream: {error['message'][:200]}"
    if last == "[DONE]" or (isinstance(last, dict) and _ends(last)):
        return None
    return "a stream has no end"


def _ends(event: dict[str, Any]) -> bool:
    return event.get("type") in _LAST_TYPES or event.get("error") is not None


def _events(body: bytes) -> Iterator[Any]:
    for line in body.decode(errors="replace").splitlines():
        if line.startswith("data:"):
            data = line.removeprefix("data:").strip()
            yield "[DONE]" if data == "[DONE]" else parsed(data.encode())


def parsed(body: bytes) -> Any:
    """Return what JSON holds; None if it is none."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None
