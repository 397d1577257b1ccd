"""What headers and bodies say of a request's client, in vLLM's order."""

from typing import Any

import pytest

from adakv_serve.router.session_hints import session_key
from adakv_serve.serving.http.rendered import Handling
from adakv_serve.serving.ingress.sender import Sender


@pytest.mark.parametrize(
    ("body", "header", "options", "named"),
    [
        (None, None, None, None),
        ("a", "b", {"session_id": "c"}, "a"),
        ("", "b", {"session_id": "c"}, "b"),
        (None, None, {"session_id": "c"}, "c"),
        (None, "", {"session_id": "c"}, "c"),
        (None, None, {"session_id": 3}, None),
        (None, None, {"session_id": ["c"]}, None),
    ],
)
def test_a_session_is_named_where_vllm_looks_for_it(
    body: str | None, header: str | None, options: dict[str, Any] | None, named: str | None
) -> None:
    headers = [(b"x-adakv-tenant", b"tenant")]
    if header is not None:
        headers.append((b"x-session-id", header.encode()))
    sender = Sender.of(headers).with_body(Handling(body), options)
    assert sender.session == (None if named is None else session_key("tenant", named))


@pytest.mark.parametrize(
    ("header", "body", "priority"),
    [
        (None, 0, 0), (None, 3, 3), (b"-2", 3, -2), (b"0", 3, 0), (b"high", 3, 3), (b"", 3, 3),
        (b"9" * 5000, 3, 3), (b"\xb2", 3, 3), (None, 10**400, 10**400),
        (b"%d" % 2**63, 3, 3), (b"%d" % (2**63 - 1), 3, 2**63 - 1), (b"-%d" % 10**20, 3, 3),
    ],
)  # fmt: skip
def test_a_headers_priority_counts_more_than_the_bodys(
    header: bytes | None, body: int, priority: int
) -> None:
    headers = [] if header is None else [(b"x-vllm-priority", header)]
    assert Sender.of(headers).with_body(Handling(priority=body)).priority == priority


def test_the_first_of_equal_headers_counts() -> None:
    sender = Sender.of([(b"x-session-id", b"a"), (b"x-session-id", b"b")])
    assert sender.session_id == "a"
