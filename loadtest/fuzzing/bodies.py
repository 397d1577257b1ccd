"""Mutations of a JSON body: of its values, its fields, its text and its bytes."""

import copy
import gzip
import json
import random
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from adakv_serve.loadtest.fuzzing import odd
from adakv_serve.loadtest.fuzzing.forms import COMPRESSION, COSTS, Body, Form
from adakv_serve.loadtest.fuzzing.odd import Raws

Rng = random.Random
Headers = list[tuple[bytes, bytes]]
OfTree = Callable[[Rng, Body, Form, Raws], None]
OfBytes = Callable[[Rng, bytes, Headers], bytes]

_Slot = tuple[Any, Any]

# Five megabytes in five kilobytes.
_BOMB = gzip.compress(b" " * 5_000_000 + b"{}", mtime=0)


def slots(value: Any) -> Iterator[_Slot]:
    """Yield every place of a value inside a body, as its container and its key there."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, member in list(items):
        yield value, key
        if isinstance(member, dict | list):
            yield from slots(member)


def _replace(odd_value: Callable[[Rng, Raws], Any]) -> OfTree:
    def mutate(rng: Rng, body: Body, form: Form, raws: Raws) -> None:
        found = list(slots(body))
        if not found:
            return
        container, key = rng.choice(found)
        container[key] = odd_value(rng, raws)

    return mutate


def _missing(rng: Rng, body: Body, form: Form, raws: Raws) -> None:
    found = list(slots(body))
    if not found:
        return
    container, key = rng.choice(found)
    del container[key]


def _unknown(rng: Rng, body: Body, form: Form, raws: Raws) -> None:
    names = ("unheard_of", "", "__class__", "Messages", "max_tokens ", "model.name", "a" * 3000)
    places = [body, *(c[k] for c, k in slots(body) if isinstance(c[k], dict))]
    rng.choice(places)[rng.choice(names)] = odd.anything(rng, raws)


def _field(rng: Rng, body: Body, form: Form, raws: Raws) -> None:
    """Add fields that the endpoint may have, with a valid or an odd value."""
    if not form.fields:
        return
    for name in rng.sample(sorted(form.fields), rng.randint(1, min(3, len(form.fields)))):
        valid = copy.deepcopy(form.fields[name])
        body[name] = valid if rng.random() < 0.5 else odd.anything(rng, raws)


def _compression(rng: Rng, body: Body, form: Form, raws: Raws) -> None:
    """Give options of the compression, known and unknown, valid and odd."""
    options: Body = {}
    for name in rng.sample(sorted(COMPRESSION), rng.randint(1, 3)):
        options[name] = COMPRESSION[name] if rng.random() < 0.4 else odd.anything(rng, raws)
    if rng.random() < 0.2:
        options[rng.choice(("adakv_", "adakv_bugdet_tokens", "ADAKV_POLICY", "adakv"))] = 1
    body[rng.choice(("vllm_xargs", "vllm_xargs", "kv_compression"))] = options


def _other_model(rng: Rng, body: Body, form: Form, raws: Raws) -> None:
    body["model"] = rng.choice(
        ("", "no-such-model", "SMOLLM2-135M-INSTRUCT", "../model", "m" * 999)
    )


OF_TREE: dict[str, OfTree] = {
    "type": _replace(odd.other_type),
    "number": _replace(odd.number),
    "string": _replace(odd.string),
    "nesting": _replace(odd.nested),
    "width": _replace(odd.wide),
    "missing field": _missing,
    "unknown field": _unknown,
    "optional field": _field,
    "compression option": _compression,
    "model": _other_model,
}


def written(body: Body, raws: Raws) -> bytes:
    """Return the body's bytes; halves of surrogate pairs stay escapes."""
    return raws.fill(json.dumps(body)).encode()


def is_bounded(before: Body, after: Body) -> bool:
    """Return whether no field has changed that decides how much a request costs."""
    absent = object()
    return all(before.get(name, absent) == after.get(name, absent) for name in COSTS)


def _broken(rng: Rng, data: bytes, headers: Headers) -> bytes:
    at = rng.randrange(len(data) + 1)
    return rng.choice(
        (
            data[:at], data[at:], b"", b"null", b"[]", b'"text"', b"1", b"{}", b"[" + data + b"]",
            data.replace(b'"', b"'"), data[:-1] + b",}", b"// a comment\n" + data, data + data,
            data + b"\0", data[:at] + b"\xff" + data[at:], data + b"]" * 50, b" " * 5000 + data,
            data[:at] + b"\\" + data[at:], data[:at] + b"\x01" + data[at:], b"\n" * 100,
            b'{"model": "' + b"\\u" * 500, rng.randbytes(200),
        )
    )  # fmt: skip


def _repeated(rng: Rng, data: bytes, headers: Headers) -> bytes:
    """Have a field twice, with another value each time."""
    name = rng.choice(("model", "max_tokens", "messages", "prompt", "stream", "temperature"))
    twice = f'"{name}": {rng.choice(("1", "null", "[]", "true"))}, '.encode()
    return b"{" + twice + data[1:] if rng.random() < 0.5 else data[:-1] + b", " + twice[:-2] + b"}"


def _charset(rng: Rng, data: bytes, headers: Headers) -> bytes:
    """Write the body in another charset, with or without saying so."""
    name = rng.choice(
        ("utf-8-sig", "utf-16", "utf-16-le", "utf-32", "utf-7", "latin-1", "cp037", "utf-8")
    )
    text = data.decode(errors="replace")
    if rng.random() < 0.3:
        text = text[:-1] + ', "user": "M\u00fcller"}'
    said = rng.choice((name, "utf-8", "no-such-charset", "", '"utf-8"', "utf-8; charset=latin-1"))
    _set(headers, b"content-type", f"application/json; charset={said}".encode())
    return text.encode(name, errors="replace")


def _bad_utf8(rng: Rng, data: bytes, headers: Headers) -> bytes:
    bad = rng.choice(
        (b"\xc3", b"\xff\xfe", b"\xed\xa0\xbd", b"\xf8\x88\x80\x80\x80", b"\xc0\xaf", b"\xe2\x82")
    )
    return data[:-1] + b', "user": "' + bad + b'"}'


def _content_encoding(rng: Rng, data: bytes, headers: Headers) -> bytes:
    """Compress the body, or say so and do not."""
    name, packed = rng.choice(
        (
            (b"gzip", gzip.compress(data, mtime=0)), (b"deflate", zlib.compress(data)),
            (b"br", data), (b"zstd", data), (b"gzip", data), (b"identity", data),
            (b"IDENTITY", data), (b"gzip, gzip", data), (b"", data), (b"x" * 2000, data),
            (b"gzip", _BOMB), (b"\xc2\xb2", data),
        )
    )  # fmt: skip
    _set(headers, b"content-encoding", name)
    return packed


def _content_type(rng: Rng, data: bytes, headers: Headers) -> bytes:
    _set(
        headers,
        b"content-type",
        rng.choice(
            (
                None, b"", b"text/plain", b"application/x-www-form-urlencoded", b"application/xml",
                b"multipart/form-data; boundary=x", b"multipart/form-data", b"APPLICATION/JSON",
                b"application/json, text/plain", b"application/vnd.api+json", b"a" * 3000,
                b"application/json;" * 50, b"\xff/\xfe",
            )
        ),
    )  # fmt: skip
    return data


def _set(headers: Headers, name: bytes, value: bytes | None) -> None:
    headers[:] = [(n, v) for n, v in headers if n != name]
    if value is not None:
        headers.append((name, value))


OF_BYTES: dict[str, OfBytes] = {
    "broken JSON": _broken,
    "repeated field": _repeated,
    "charset": _charset,
    "invalid UTF-8": _bad_utf8,
    "content-encoding": _content_encoding,
    "content-type": _content_type,
}
