"""Strings that UTF-8 cannot encode are found in any place of a body and in any spelling."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adakv_serve.serving.http.encodable import is_suspicious, unencodable_field

HALF = "\ud83d"
# Surrogates among them, and what escapes are made of.
TEXT = st.text(st.sampled_from('aud8e3\\"\n\ud83d\ude00\ud800\udfff\U0001f600é'), max_size=12)
BODIES = st.recursive(
    TEXT | st.none() | st.integers(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
)


def encodes(value: Any) -> bool:
    """Return whether Python encodes the parsed value."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


@given(body=BODIES, escaped=st.booleans(), encoding=st.sampled_from(["utf-8", "utf-16", "utf-32"]))
def test_exactly_the_bodies_that_python_cannot_encode_are_found(
    body: Any, escaped: bool, encoding: str
) -> None:
    given = {"field": body}
    raw = json.dumps(given, ensure_ascii=escaped).encode(encoding, "surrogatepass")
    # Two halves that stand side by side are one character once they are escaped.
    found = unencodable_field(raw)
    assert (found is None) == encodes(json.loads(raw))
    assert found is None or found.startswith("field")


@pytest.mark.parametrize(
    ("body", "path"),
    [
        ({"stop": ["ok", HALF]}, "stop[1]"),
        ({"bad_words": [HALF]}, "bad_words[0]"),
        ({"request_id": f"a{HALF}"}, "request_id"),
        ({"vllm_xargs": {"a": [1, {"b": HALF}]}}, "vllm_xargs.a[1].b"),
        ({"vllm_xargs": {HALF: 1}}, "vllm_xargs"),
        ({"messages": [{"content": [{"text": HALF}]}]}, "messages[0].content[0].text"),
        ({"a": HALF, "b": HALF}, "a"),
        ([HALF], "[0]"),
        ({HALF: 1}, ""),
    ],
)  # fmt: skip
def test_the_field_is_named(body: Any, path: str) -> None:
    assert unencodable_field(json.dumps(body).encode()) == path


@pytest.mark.parametrize(
    "body",
    [
        rb'{"a": "\\ud83d"}', rb'{"a": "\ud83d\ude00"}', rb'{"a": "\uD83D\uDE00"}',
        b'{"a": "\xf0\x9f\x98\x80 and \xed\x95\x9c"}', rb'{"a": "u\u00e9"}', b"\xed\xa0", b"\0",
        b"", rb"\ud83d", rb"--form \ud83d" + bytes(range(256)),
    ],
)  # fmt: skip
def test_other_bodies_pass(body: bytes) -> None:
    assert unencodable_field(body) is None


def test_deep_json_is_left_to_others() -> None:
    assert unencodable_field(b"[" * 100_000 + rb'"\ud83d"') is None


def test_a_valid_body_is_not_parsed() -> None:
    text = 'Ünïcode \U0001f600, "quotes", \\ud83d and\nlines'
    for escaped in (True, False):
        body = json.dumps({"prompt": text}, ensure_ascii=escaped).encode()
        assert not is_suspicious(body)


@pytest.mark.parametrize("code", [0xD800, 0xDBFF, 0xDC00, 0xDFFF])
def test_every_half_is_found_raw_and_escaped(code: int) -> None:
    for text in (chr(code), rf"\u{code:x}", rf"\u{code:X}"):
        body = f'{{"a": "{text}"}}'.encode("utf-8", "surrogatepass")
        assert unencodable_field(body) == "a"
