"""What the whole front, HAProxy and its door's server included, answers to odd clients."""

import http.client
import json
import socket
from urllib.parse import urlsplit

from tests.system.deployment import API_KEY, MODEL, Deployment

KEY = f"authorization: Bearer {API_KEY}\r\n"


def asked(deployment: Deployment, *lines: str, body: bytes = b"") -> tuple[int, bytes]:
    """Send a completion with more header lines; return the first status and its body."""
    address = urlsplit(deployment.base_url)
    head = "\r\n".join(["POST /v1/completions HTTP/1.1", "host: x", *lines])
    with socket.create_connection((address.hostname, address.port or 0), 60) as link:
        link.sendall(f"{head}\r\n{KEY}\r\n".encode() + body)
        with link.makefile("rb") as answer:
            status = int(answer.readline().split()[1])
            headers = http.client.parse_headers(answer)
            return status, answer.read(int(headers.get("content-length", 0)))


def test_a_large_body_is_refused_before_it_is_asked_for(deployment: Deployment) -> None:
    status, body = asked(deployment, f"content-length: {17 << 20}", "expect: 100-continue")
    assert (status, json.loads(body)["error"]["type"]) == (413, "RequestTooLarge")
    assert asked(deployment, "content-length: 50", "expect: 100-continue")[0] == 100


def test_large_bodies_and_answers_cross_between_deployments(deployment: Deployment) -> None:
    text = "harbour " * 700_000
    answer = deployment.post("/tokenize", {"model": MODEL, "prompt": text})
    assert answer.status_code == 200
    assert answer.json()["count"] > 700_000
    assert min(len(text), len(answer.content)) > 4 << 20


def test_what_the_doors_server_cannot_parse_gets_openais_error(deployment: Deployment) -> None:
    body = b"2\r\nab\r\n0\r\ncontent-length: 9\r\n\r\n"
    status, answer = asked(deployment, "transfer-encoding: chunked", body=body)
    assert (status, json.loads(answer)["error"]["type"]) == (400, "BadRequestError")


def test_an_unknown_method_gets_openais_error(deployment: Deployment) -> None:
    connection = http.client.HTTPConnection(urlsplit(deployment.base_url).netloc, timeout=60)
    connection.request("PROPFIND", "/v1/models")
    answer = connection.getresponse()
    assert (answer.status, json.load(answer)["error"]["code"]) == (405, 405)
    connection.close()
