"""An OpenAI-compatible server: answers as text, without probabilities."""

from collections.abc import Iterable
from typing import Any

import httpx

from adakv_serve.evals.choice import FULL, Choice, Outcome
from adakv_serve.evals.samples import Sample, Tokens, messages

_TIMEOUT_S = 600


class HttpServer:
    """Client of a server, one question at a time.

    The server compresses the whole conversation: the API cannot compress a document alone.
    """

    def __init__(self, base_url: str, tokenizer: Any, api_key: str | None = None) -> None:
        """Connect to a server.

        Raises:
            httpx.HTTPError: the server does not answer.
        """
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._client = httpx.Client(base_url=base_url, headers=headers, timeout=_TIMEOUT_S)
        self.tokenizer = tokenizer
        self.model: str = _json(self._client.get("/v1/models"))["data"][0]["id"]

    def close(self) -> None:
        self._client.close()

    def outcomes(
        self, sample: Sample, tokens: Tokens, choices: Iterable[Choice]
    ) -> dict[Choice, Outcome]:
        """Ask a sample under each choice; the full cache comes first.

        Raises:
            httpx.HTTPError: the server fails or refuses a choice.
        """
        return {
            choice: self._ask(sample, tokens.forced[tokens.answer :], choice)
            for choice in dict.fromkeys([Choice(FULL), *choices])
        }

    def answers(
        self, prompt: list[int], begin: list[int], max_tokens: int, choices: Iterable[Choice]
    ) -> dict[Choice, Outcome]:
        """Return the texts that follow the tokens, as `predicted`.

        Raises:
            httpx.HTTPError: the server fails or refuses a choice.
        """
        body: dict[str, Any] = {
            "model": self.model,
            "prompt": [*prompt, *begin],
            "max_tokens": max_tokens,
            "temperature": 0,
        }
        answered: dict[Choice, Outcome] = {}
        for choice in choices:
            asked = {**body, "vllm_xargs": choice.xargs()}
            reply = _json(self._client.post("/v1/completions", json=asked))
            answered[choice] = self._outcome(reply, reply["choices"][0]["text"])
        return answered

    def _ask(self, sample: Sample, expected: list[int], choice: Choice) -> Outcome:
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": len(expected),
            "temperature": 0,
            "vllm_xargs": choice.xargs(),
        }
        if sample.turns:
            body["messages"] = messages(sample)
            if sample.cue:
                # vLLM's way to continue an answer; other servers may have another.
                body["messages"].append({"role": "assistant", "content": sample.cue})
                body |= {"add_generation_prompt": False, "continue_final_message": True}
            reply = _json(self._client.post("/v1/chat/completions", json=body))
            text = reply["choices"][0]["message"]["content"] or ""
        else:
            body["prompt"] = sample.document
            reply = _json(self._client.post("/v1/completions", json=body))
            text = reply["choices"][0]["text"]
        outcome = self._outcome(reply, text)
        # Different tokens may spell the same text.
        if text == self.tokenizer.decode(expected):
            outcome.predicted = expected
        return outcome

    def _outcome(self, reply: dict[str, Any], text: str) -> Outcome:
        proof = reply.get("kv_compression") or {}
        return Outcome(
            self.tokenizer.encode(text, add_special_tokens=False),
            kept_tokens=proof.get("kept_mean"),
            skipped=proof.get("skipped"),
        )


def _json(response: httpx.Response) -> Any:
    if response.is_error:
        # The body has the reason.
        raise httpx.HTTPStatusError(
            f"{response.request.url} answers {response.status_code}: {response.text[:500]}",
            request=response.request,
            response=response,
        )
    return response.json()
