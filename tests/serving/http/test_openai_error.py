"""Errors in OpenAI's form, whole and inside a stream."""

import json

from adakv_serve.serving.http.openai_error import error_event, error_messages


def test_an_error_names_its_parameter_and_has_its_headers() -> None:
    start, body = error_messages(
        400, "no", type_="BadRequestError", param="stop[1]", headers={"x-more": "1"}
    )
    assert json.loads(body["body"]) == {
        "error": {"message": "no", "type": "BadRequestError", "param": "stop[1]", "code": 400}
    }
    assert (start["status"], body["more_body"]) == (400, False)
    assert start["headers"] == [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body["body"])).encode()),
        (b"x-more", b"1"),
    ]


def test_an_error_in_a_stream_is_one_event() -> None:
    event = error_event(503, "gone", type_="ReplicaLost", path="/v1/completions")
    assert event.startswith(b"data: {")
    assert event.endswith(b"}\n\n")
    assert json.loads(event.removeprefix(b"data: ")) == {
        "error": {"message": "gone", "type": "ReplicaLost", "param": None, "code": 503}
    }


def test_anthropics_clients_raise_what_ends_a_stream() -> None:
    event = error_event(503, "gone", type_="ReplicaLost", path="/v1/messages")
    name, data = event.removesuffix(b"\n\n").split(b"\n")
    assert name == b"event: error"
    assert json.loads(data.removeprefix(b"data: ")) == {
        "type": "error", "error": {"type": "ReplicaLost", "message": "gone"},
    }  # fmt: skip
