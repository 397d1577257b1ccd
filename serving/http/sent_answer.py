"""What a client has got of a streamed answer, and what another replica's stream adds to it."""

import io
from array import array
from collections import defaultdict
from typing import Any

from adakv_serve.serving.http.sse import JsonObject

# What a delta has besides text.
_NO_TEXT = ("role", "tool_calls")


class Differs(Exception):
    """The other replica's answer does not begin with what has been sent."""


class SentAnswer:
    """The part of one chat's or completion's stream that its client has got.

    tokens: those of this part and perhaps some more; None if no replica tells them.
    """

    def __init__(self) -> None:
        self.tokens: array[int] | None = None
        self._head: JsonObject = {}
        # By field: the message's content, its reasoning, a completion's text.
        self._texts: defaultdict[str, io.StringIO] = defaultdict(io.StringIO)
        self._token_ids = 0
        self._has_role = False
        # What cannot be sent in parts by two replicas, or has all been sent.
        self._is_closed = False

    @property
    def can_go_on(self) -> bool:
        """Whether another replica can send the rest."""
        return self.tokens is not None and not self._is_closed

    def note_tokens(self, tokens: list[int] | None) -> None:
        """Add the tokens that the replica tells before a part of the stream."""
        if tokens is not None:
            if self.tokens is None:
                self.tokens = array("L")
            self.tokens.extend(tokens)

    def note(self, chunk: JsonObject) -> None:
        """Add a chunk that the client gets."""
        if not self._head:
            self._head = {key: chunk[key] for key in ("id", "created") if key in chunk}
        self._is_closed = self._is_closed or "error" in chunk
        for choice in chunk.get("choices", ()):
            said = _said(choice)
            self._has_role = self._has_role or "role" in said
            for field, text in _texts(said):
                self._texts[field].write(text)
            self._token_ids += len(choice.get("token_ids") or ())
            ended = choice.get("finish_reason") is not None
            if ended or choice.get("index") != 0 or said.get("tool_calls"):
                self._is_closed = True

    def rest(self) -> "Rest":
        """Return what cuts another replica's stream of the whole answer to its rest."""
        texts = {field: text.getvalue() for field, text in self._texts.items()}
        return Rest(self._head, texts, self._token_ids, has_role=self._has_role)


class Rest:
    """Cuts the chunks of a whole answer to what its client has not got."""

    def __init__(
        self, head: JsonObject, texts: dict[str, str], token_ids: int, *, has_role: bool
    ) -> None:
        """
        Args:
            head: fields that all chunks of one answer share.
            texts: what the client has got, by field.
            token_ids: number of token ids that it has got, because it asked for them.
            has_role: whether it has got the message's role.
        """
        self._head = head
        self._missing = {field: text for field, text in texts.items() if text}
        self._token_ids = token_ids
        self._has_role = has_role
        self._has_begun = False

    def cut(self, chunk: JsonObject) -> JsonObject | None:
        """Return what is new in the next chunk; None if nothing is. It may change the chunk.

        Raises:
            Differs: the chunk contradicts what the client has got.
        """
        if "error" in chunk:
            return chunk
        chunk.update(self._head)
        if (self._has_begun and not self._missing) or not chunk.get("choices"):
            return chunk
        (choice,) = chunk["choices"]
        said = _said(choice)
        if self._has_role and said.pop("role", None) is not None:
            chunk.pop("prompt_token_ids", None)
        else:
            self._has_begun = True
        for field, text in _texts(said):
            said[field] = self._new(field, text)
        if self._head and "token_ids" in choice:
            self._cut_ids(choice)
        news = [
            *(text for _, text in _texts(said)), said.get("role"), said.get("tool_calls"),
            choice.get("token_ids"), choice.get("finish_reason"),
        ]  # fmt: skip
        return chunk if any(news) else None

    def _new(self, field: str, text: str) -> str:
        sent = self._missing.get(field, "")
        both = min(len(sent), len(text))
        if sent[:both] != text[:both]:
            raise Differs(field)
        if len(sent) > both:
            self._missing[field] = sent[both:]
        else:
            self._missing.pop(field, None)
        return text[both:]

    def _cut_ids(self, choice: JsonObject) -> None:
        ids = choice["token_ids"] or []
        choice["token_ids"] = ids[self._token_ids :]
        self._token_ids = max(0, self._token_ids - len(ids))
        if "prompt_token_ids" in choice:
            choice["prompt_token_ids"] = None


def _said(choice: JsonObject) -> JsonObject:
    """Return the part of a choice with its text: a chat's delta, or a completion's choice."""
    said: JsonObject = choice.get("delta", choice)
    return said


def _texts(said: JsonObject) -> list[tuple[str, Any]]:
    if "text" in said:
        return [("text", said["text"] or "")]
    return [(k, v) for k, v in said.items() if isinstance(v, str) and k not in _NO_TEXT]
