"""Mutations of what goes over the connection: methods, targets, headers, lengths, manners."""

import random
from collections.abc import Callable

from adakv_serve.loadtest.fuzzing.sending import Draft, Headers, Sending, content_length

Rng = random.Random
OfDraft = Callable[[Rng, Draft], Draft]
OfManner = Callable[[Rng, Draft], Sending]

# How long a client stalls before it leaves, and how long a slow one pauses.
_STALL_S, _PAUSE_S = 2.0, 0.2


def _method(rng: Rng, draft: Draft) -> Draft:
    names = (
        b"GET", b"PUT", b"DELETE", b"PATCH", b"OPTIONS", b"HEAD", b"TRACE", b"post", b"PROPFIND",
        b"X" * 200, b"P\xc3\x96ST", b"POST POST", b"",
    )  # fmt: skip
    return draft._replace(method=rng.choice(names))


def _target(rng: Rng, draft: Draft) -> Draft:
    path = draft.target
    targets = (
        b"/" + path, path + b"/", path + b"//", path.upper(), b"/.." + path, path + b"/../models",
        path + b"%00", path + b"%0d%0ax-forged:%201", path + b"%ff", path + b"?a=b&a=c&stream=true",
        path + b"?" + b"a" * 4000, path + b"#fragment", b"http://elsewhere" + path, b"*", b"",
        path + b"%2f..%2fsleep", b"/sleep", b"/collective_rpc", b"/metrics", b"/v1/models/" * 20,
        path + b"\x01", path + b"\xff", path.replace(b"/", b"\\"), path + b";a=b",
        b"/v1/models/%2e%2e/x", b"/v1/responses/resp_1", b"/v1/responses/%0a/cancel", b"/docs/../x",
        b"/" + b"a" * 9000,
    )  # fmt: skip
    return draft._replace(target=rng.choice(targets))


def _version(rng: Rng, draft: Draft) -> Draft:
    versions = (b"HTTP/1.0", b"HTTP/0.9", b"HTTP/2.0", b"HTTP/1.2", b"HTTP/11", b"http/1.1", b"x")
    return draft._replace(version=rng.choice(versions))


_EXTRA_HEADERS: tuple[Headers, ...] = (
    [(b"x-request-id", b"one"), (b"x-request-id", b"two")],
    [(b"x-request-id", b"")],
    [(b"x-request-id", b"\xff\xfe")],
    [(b"x-request-id", b"a" * 5000)],
    [(b"x-request-id", b"a b\tc")],
    [(b"x-adakv-tenant", b"another"), (b"x-adakv-session", b"other")],
    [(b"x-forwarded-for", b"127.0.0.1"), (b"x-forwarded-proto", b"https")],
    [(b"forwarded", b"for=127.0.0.1"), (b"x-real-ip", b"127.0.0.1")],
    [(b"traceparent", b"00-" + b"0" * 32 + b"-" + b"0" * 16 + b"-01")],
    [(b"traceparent", b"x" * 500), (b"tracestate", b"=,=,=")],
    [(b"cookie", b"session=" + b"a" * 3000)],
    [(b"range", b"bytes=0-1"), (b"if-none-match", b"*")],
    [(b"accept", b"text/event-stream"), (b"accept-encoding", b"gzip, br, *;q=0")],
    [(b"origin", b"null"), (b"access-control-request-method", b"POST")],
    [(b"connection", b"upgrade"), (b"upgrade", b"h2c"), (b"http2-settings", b"AAMAAABkAAQAAP__")],
    [(b"connection", b"close, x-request-id, authorization")],
    [(b"expect", b"100-continue")],
    [(b"expect", b"200-ok")],
    [(b"te", b"trailers"), (b"trailer", b"authorization")],
    [(b"x-priority", b"high"), (b"priority", b"u=9")],
    [(b"x-vllm-priority", b"99999999999999999999")],
    [(b"x-vllm-priority", b"-" + b"9" * 5000), (b"x-vllm-priority", b"1")],
    [(b"serve_multiplexed_model_id", b"other"), (b"x-serve-timeout", b"0")],
    [(b"x-session-id", b"a" * 300), (b"session-id", b"\xe2\x82\xac")],
    [(b"x-data-parallel-rank", b"-1")],
    [(b"x-data-parallel-rank", b"abc")],
    [(b"host", b"elsewhere"), (b"host", b"another")],
    [(b"authorization", b"Bearer"), (b"authorization", b"Basic \xff")],
    [(b"x-" + b"n" * 500, b"v")],
    [(b"x-huge", b"v" * 20_000)],
    [(b"x-large", b"v" * 7000)],
    [(b"x-%d" % number, b"v") for number in range(60)],
    [(b"x-%d" % number, b"v") for number in range(200)],
    [(b"bad name", b"v")],
    [(b"", b"v")],
    [(b"x-nul", b"a\0b")],
    [(b"x-cr", b"a\rb")],
    [(b"x-folded", b"a\r\n b")],
    [(b"x-latin", b"M\xfcller")],
)


def _headers(rng: Rng, draft: Draft) -> Draft:
    extra = rng.choice(_EXTRA_HEADERS)
    if rng.random() < 0.5:
        return draft._replace(headers=[*draft.headers, *extra])
    return draft._replace(headers=[*extra, *draft.headers])


def _forged(rng: Rng, draft: Draft) -> Draft:
    """Change the key, or leave it out."""
    others = [(name, value) for name, value in draft.headers if name != b"authorization"]
    values = (
        b"",
        b"Bearer ",
        b"Bearer wrong",
        b"bearer\twrong",
        b"Bearer \xc3\xa9",
        b"Bearer " * 99,
    )
    value = rng.choice((None, *values))
    forged = [] if value is None else [(b"authorization", value)]
    return draft._replace(headers=[*others, *forged])


def _length(rng: Rng, draft: Draft) -> Draft:
    """State another length than the body's, or one that is no number."""
    size = len(draft.body)
    lengths = (
        (content_length("\u00b2"),), (content_length("9" * 5000),), (content_length(-1),),
        (content_length(f"+{size}"),), (content_length(f"{size}, {size}"),), (content_length(""),),
        (content_length(size), content_length(size)), (content_length(size), content_length(1)),
        (content_length(f"0x{size:x}"),), (content_length(f"{size}.0"),), (content_length(10**17),),
        (content_length(17 << 20),), (content_length(size // 2),), (content_length(0),), (),
        (content_length(size), (b"transfer-encoding", b"chunked")),
        ((b"transfer-encoding", b"gzip, chunked"),), ((b"transfer-encoding", b"identity"),),
        ((b"transfer-encoding", b"xchunked"),),
    )  # fmt: skip
    return draft._replace(length=rng.choice(lengths))


def _chunked(rng: Rng, draft: Draft) -> Draft:
    """Send the body in chunks, some of which are wrong."""
    size = rng.choice((1, 7, 50, 100_000))
    extension = rng.choice((b"", b"", b";a=b", b';a="\x01"', b" ", b";" + b"a" * 3000))
    parts = [draft.body[at : at + size] for at in range(0, len(draft.body), size)][:3000]
    data = b"".join(b"%x%s\r\n%s\r\n" % (len(part), extension, part) for part in parts)
    end = rng.choice(
        (b"0\r\n\r\n", b"0\r\n\r\n", b"0\r\nx-trailer: v\r\n\r\n", b"0000\r\n\r\n", b"-1\r\n\r\n",
         b"zz\r\n\r\n", b"ffffffffffffffff\r\n\r\n", b"0\r\ncontent-length: 9\r\n\r\n")
    )  # fmt: skip
    return draft._replace(body=data + end, length=((b"transfer-encoding", b"chunked"),))


OF_DRAFT: dict[str, OfDraft] = {
    "method": _method,
    "target": _target,
    "HTTP version": _version,
    "headers": _headers,
    "forged key": _forged,
    "content-length": _length,
    "chunks": _chunked,
}


def whole(draft: Draft) -> Sending:
    """Return the request as an honest client sends it."""
    return Sending((draft.data,), (draft.method.decode("latin-1"),))


def _cut(rng: Rng, draft: Draft) -> tuple[bytes, bytes]:
    at = rng.randrange(1, len(draft.data))
    return draft.data[:at], draft.data[at:]


def _half_sent(rng: Rng, draft: Draft) -> Sending:
    """Send a part of the request and close the connection, or half of it."""
    begun, _ = _cut(rng, draft)
    if rng.random() < 0.5:
        return Sending((begun,), (), leaves_after_s=0.0)
    return Sending((begun,), (), shuts=True, leaves_after_s=_STALL_S)


def _stalled(rng: Rng, draft: Draft) -> Sending:
    """Send a part of the request and nothing more."""
    begun, _ = _cut(rng, draft)
    return Sending((begun,), (), leaves_after_s=_STALL_S)


def _slow(rng: Rng, draft: Draft) -> Sending:
    """Send the whole request, in pieces with pauses."""
    data, pieces = draft.data, rng.randint(2, 6)
    step = max(1, len(data) // pieces)
    parts = tuple(data[at : at + step] for at in range(0, len(data), step))
    return whole(draft)._replace(pieces=parts, pause_s=_PAUSE_S)


def _leaves(rng: Rng, draft: Draft) -> Sending:
    """Leave before the answer, or in the middle of it."""
    return Sending((draft.data,), (), leaves_after_s=rng.choice((0.0, 0.01, 0.1, 0.5)))


def _shuts(rng: Rng, draft: Draft) -> Sending:
    """Send the whole request, and close this half of the connection."""
    return Sending((draft.data,), (), shuts=True, leaves_after_s=_STALL_S)


def _pipelined(rng: Rng, draft: Draft) -> Sending:
    """Send more requests without awaiting the first answer."""
    more = rng.choice(
        (
            (draft.data, draft.data),
            (draft.data, b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n"),
            (b"GET /version HTTP/1.1\r\nhost: x\r\n\r\n", draft.data),
            (draft.data, b"\r\n\r\n"),
            (draft.data, b"garbage\r\n\r\n"),
        )
    )
    method = draft.method.decode("latin-1")
    owed = {b"GET": "GET", b"gar": "garbage", b"\r\n\r": ""}
    methods = [owed.get(part[:3], method) for part in more]
    return Sending((b"".join(more),), tuple(filter(None, methods)))


OF_MANNER: dict[str, OfManner] = {
    "half sent": _half_sent,
    "stalled": _stalled,
    "slow": _slow,
    "leaves": _leaves,
    "half closed": _shuts,
    "pipelined": _pipelined,
}
