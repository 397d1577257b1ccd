"""OpenAI error objects, in the form that vLLM's own endpoints use."""

import json

from adakv_serve.serving.http.asgi import Message


def error_body(status: int, message: str, *, type_: str, param: str | None = None) -> bytes:
    """Return the JSON body `{"error": {"message", "type", "param", "code"}}`."""
    error = {"message": message, "type": type_, "param": param, "code": status}
    return json.dumps({"error": error}).encode()


def error_messages(
    status: int,
    message: str,
    *,
    type_: str,
    param: str | None = None,
    headers: dict[str, str] | None = None,
) -> list[Message]:
    """Return the ASGI messages of a response that is one error."""
    body = error_body(status, message, type_=type_, param=param)
    sent = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        **(headers or {}),
    }
    raw = [(name.encode(), value.encode()) for name, value in sent.items()]
    return [
        {"type": "http.response.start", "status": status, "headers": raw},
        {"type": "http.response.body", "body": body, "more_body": False},
    ]


def error_event(status: int, message: str, *, type_: str, path: str) -> bytes:
    """Return the server-sent event that ends a broken stream.

    Args:
        path: of the request. Anthropic's clients pass over events without a name.
    """
    if path.startswith("/v1/messages"):
        error = {"type": "error", "error": {"type": type_, "message": message}}
        return b"event: error\ndata: " + json.dumps(error).encode() + b"\n\n"
    return b"data: " + error_body(status, message, type_=type_) + b"\n\n"
