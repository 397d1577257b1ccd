"""Ray Serve's prefix-aware router for language models, for requests that come as HTTP bodies."""

import json
from typing import Any

from ray.llm._internal.serve.routing_policies.prefix_aware.prefix_aware_router import (
    PrefixCacheAffinityRouter,
)
from ray.serve.request_router import PendingRequest, RunningReplica

# What requests say their prompts by, in the order in which they are looked for.
_PROMPTS = ("messages", "prompt", "input")


class PrefixAwareRouter(PrefixCacheAffinityRouter):
    """`ray.serve.llm.request_router.PrefixCacheAffinityRouter`, told the prompts of our requests.

    Ray's class expects parsed requests as arguments; the ingress sends scopes and bodies.
    """

    def _extract_text_from_request(self, pending_request: PendingRequest) -> str:
        return prompt_text(pending_request.args[1]) or " "

    def on_request_routed(self, pending_request: PendingRequest, *args: Any) -> None:
        # Calls without a body, such as those of health checks, have no prompt to remember.
        if len(pending_request.args) > 1:
            super().on_request_routed(pending_request, *args)

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> Any:
        if pending_request is not None and len(pending_request.args) < 2:
            pending_request = None
        return await super().choose_replicas(candidate_replicas, pending_request)


def prompt_text(body: bytes) -> str:
    """Return the text of a request's prompt as Ray's router compares it; empty if there is none."""
    try:
        request = json.loads(body)
        if not isinstance(request, dict):
            return ""
        return _text(next((request[name] for name in _PROMPTS if request.get(name)), None))
    except (ValueError, RecursionError):
        # The engine refuses it. An exception would end Serve's search for a replica, and leave the
        # request without an answer.
        return ""


def _text(value: object) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return "".join(map(_text, value))
    if isinstance(value, dict):
        return _text(value.get("text") or value.get("content"))
    return ""
