"""Requests with strings that UTF-8 cannot encode, at the running application."""

import json
from typing import Any

import pytest

from tests.system.deployment import API_KEY, MODEL, Deployment
from tests.waiting import eventually

HALF = "\ud83d"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
HEADERS = {"authorization": f"Bearer {API_KEY}", "content-type": "application/json"}
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "stop": (CHAT, {"messages": QUESTION, "stop": [HALF]}, "stop[0]"),
    "a message": (CHAT, {"messages": [{"role": "user", "content": HALF}]}, "messages[0].content"),
    "session_id": (COMPLETIONS, {"prompt": "Once", "session_id": HALF}, "session_id"),
    "request_id": (COMPLETIONS, {"prompt": "Once", "request_id": HALF}, "request_id"),
    "vllm_xargs": (COMPLETIONS, {"prompt": "Once", "vllm_xargs": {"a": HALF}}, "vllm_xargs.a"),
    "a schema": (
        CHAT,
        {"messages": QUESTION, "structured_outputs": {"choice": [HALF]}},
        "structured_outputs.choice[0]",
    ),
    "responses": ("/v1/responses", {"input": HALF}, "input"),
    "messages": ("/v1/messages", {"messages": QUESTION, "system": HALF}, "system"),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("stream", [False, True])
def test_they_are_refused_with_the_field(deployment: Deployment, name: str, stream: bool) -> None:
    path, given, field = WRONG[name]
    body = {"model": MODEL, "max_tokens": 4, "stream": stream, **given}
    refused = deployment.post(path, headers=HEADERS, content=json.dumps(body))
    assert refused.status_code == 400
    error = refused.json()["error"]
    assert error["param"] == field
    assert error["message"].startswith(f"{field} has half of a surrogate pair")


def test_no_replica_counts_them(deployment: Deployment) -> None:
    body = json.dumps({"model": MODEL, "prompt": "Once", "max_tokens": 4, "stop": [HALF]})
    for _ in range(5):
        deployment.post(COMPLETIONS, headers=HEADERS, content=body)
    eventually(
        lambda: all(
            (one.running, one.waiting, one.prefill_tokens_queued) == (0, 0, 0)
            for one in deployment.occupancy().values()
        ),
        30,
        "an idle fleet",
    )
