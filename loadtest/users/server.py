"""What users ask a server besides their prompts, and how its errors read."""

import json
import os
from typing import Any
from urllib.parse import urlsplit

from geventhttpclient import HTTPClient


def headers() -> dict[str, str]:
    """Return the headers of a request, with the key from $OPENAI_API_KEY where it is set."""
    sent = {"Content-Type": "application/json"}
    if key := os.environ.get("OPENAI_API_KEY"):
        sent["Authorization"] = f"Bearer {key}"
    return sent


def path_at(host: str, path: str) -> str:
    """Return the path of an endpoint on a host whose URL may have a path itself."""
    return urlsplit(host).path.rstrip("/") + path


def model_card(host: str, wanted: str) -> dict[str, Any]:
    """Return the server's entry for the wanted model, or its first one for an empty name.

    Raises:
        ValueError: the server refused, or has no such model.
        OSError: there is no connection.
    """
    client = HTTPClient.from_url(host, connection_timeout=30, network_timeout=60)
    try:
        response = client.request("GET", path_at(host, "/v1/models"), headers=headers())
        body = bytes(response.read())
    finally:
        client.close()
    if response.status_code != 200:
        raise ValueError(f"/v1/models answers {response.status_code}: {error_message(body)}")
    cards: list[dict[str, Any]] = json.loads(body)["data"]
    for card in cards:
        if wanted in ("", card["id"]):
            return card
    known = ", ".join(card["id"] for card in cards)
    raise ValueError(f"the server has no model '{wanted}': it has {known}")


def error_message(body: bytes) -> str:
    """Return the message of an OpenAI error body, or the beginning of any other."""
    try:
        return str(json.loads(body)["error"]["message"])[:200]
    except (ValueError, KeyError, TypeError):
        return body[:200].decode(errors="replace")
