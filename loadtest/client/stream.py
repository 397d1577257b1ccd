"""An OpenAI stream as a client sees it: text, times, token counts and extensions."""

import itertools
import json
from typing import Any

_DATA = "data: "


class StreamBroken(RuntimeError):
    """The server ended the stream with an error."""


class StreamedAnswer:
    """One stream, collected line by line. Times are those of the caller's clock, in seconds.

    token_ids: empty unless the request asked for them. usage: the server's own counts.
    proof: `kv_compression`, from servers that compress. finished: whether the stream ended
    regularly.
    """

    def __init__(self, started_s: float) -> None:
        self._started_s = started_s
        self._text_at_s: list[float] = []
        self._texts: list[str] = []
        self.token_ids: list[int] = []
        self.usage: dict[str, Any] = {}
        self.proof: dict[str, Any] | None = None
        self.finished = False

    def take(self, line: str, now_s: float) -> None:
        """Add a line of the stream that came at `now_s`.

        Raises:
            StreamBroken: the line is an error.
        """
        if not line.startswith(_DATA):
            return
        data = line.removeprefix(_DATA).strip()
        if data == "[DONE]":
            self.finished = True
            return
        event = json.loads(data)
        if "error" in event:
            raise StreamBroken(event["error"].get("message", "no message"))
        for choice in event.get("choices", ()):
            if text := choice.get("text") or choice.get("delta", {}).get("content"):
                self._texts.append(text)
                self._text_at_s.append(now_s)
            self.token_ids += choice.get("token_ids") or ()
        self.usage = event.get("usage") or self.usage
        self.proof = event.get("kv_compression") or self.proof

    @property
    def text(self) -> str:
        return "".join(self._texts)

    @property
    def ttft_s(self) -> float | None:
        """The time from sending to the first text."""
        return self._text_at_s[0] - self._started_s if self._text_at_s else None

    @property
    def itl_s(self) -> list[float]:
        """The times between one piece of text and the next."""
        times = self._text_at_s
        return [later - earlier for earlier, later in itertools.pairwise(times)]

    @property
    def tpot_s(self) -> float | None:
        """Mean time for each output token after the first."""
        if len(self._text_at_s) < 2 or self.output_tokens < 2:
            return None
        return (self._text_at_s[-1] - self._text_at_s[0]) / (self.output_tokens - 1)

    @property
    def prompt_tokens(self) -> int:
        return self.usage.get("prompt_tokens", 0)

    @property
    def output_tokens(self) -> int:
        return self.usage.get("completion_tokens", 0)

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens from the server's prefix cache; 0 if it reports none."""
        return (self.usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
