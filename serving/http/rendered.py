"""What the router learns of a request by rendering it as the engine does."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol


class Handling(NamedTuple):
    """How a request's body asks to be treated.

    session_id: what it calls the conversation.
    priority: as in vLLM, a lower number is more important.
    """

    session_id: str | None = None
    priority: int = 0


class Rendered(NamedTuple):
    """A request's prompts, and what else counts for the memory that it takes.

    prompts: token ids of each.
    answers: answers to each prompt.
    most_output_tokens: most tokens of each answer; None where the request names no limit.
    extra_args: its own options (`vllm_xargs`).
    cache_salt, model: prompts with other ones share no prefix.
    takes_ids: whether the engine takes the ids instead of rendering the request again.
    """

    prompts: list[list[int]]
    answers: int = 1
    most_output_tokens: int | None = None
    extra_args: Mapping[str, Any] | None = None
    cache_salt: str | None = None
    model: str | None = None
    takes_ids: bool = False
    handling: Handling = Handling()


_USUAL = Handling()


class NotRendered(Exception):
    """A request whose prompts are not known here.

    reason: `form`, `content` (images, embeddings, a response that the engine has stored), or
        `malformed`, for a request that the engine refuses with a better message.
    """

    def __init__(self, reason: str, message: object = "", handling: Handling = _USUAL) -> None:
        super().__init__(message)
        self.reason = reason
        self.handling = handling


class Renderer(Protocol):
    """Renders the bodies of requests that generate something."""

    def takes(self, path: str) -> bool:
        """Return whether requests to a path generate something."""
        ...

    async def render(self, path: str, body: bytes) -> Rendered:
        """Render a request.

        Raises:
            NotRendered: its prompts are not known here.
        """
        ...
