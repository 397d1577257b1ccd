"""Answers of any OpenAI-compatible server: text alone, no probabilities."""

from collections.abc import Iterable
from typing import Any

import httpx

from evals.choice import FULL, Choice, Outcome
from evals.samples import Sample, Tokens, messages

_TIMEOUT_S = 600


class HttpServer:
    """Asks one question after the other. The whole conversation is the prompt that is compressed:
    over the API nobody can have a document compressed by itself."""

    def __init__(self, base_url: str, tokenizer: Any, api_key: str | None = None) -> None:
        """Raises httpx.HTTPError: nobody answers there."""
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._client = httpx.Client(base_url=base_url, headers=headers, timeout=_TIMEOUT_S)
        self.tokenizer = tokenizer
        self.model: str = _json(self._client.get("/v1/models"))["data"][0]["id"]

    def close(self) -> None:
        self._client.close()

    def outcomes(
        self, sample: Sample, tokens: Tokens, choices: Iterable[Choice]
    ) -> dict[Choice, Outcome]:
        """Raises httpx.HTTPError: the server fails, or does not take the choice."""
        return {
            choice: self._ask(sample, tokens.forced[tokens.answer :], choice)
            for choice in dict.fromkeys([Choice(FULL), *choices])
        }

    def answers(
        self, prompt: list[int], begin: list[int], max_tokens: int, choices: Iterable[Choice]
    ) -> dict[Choice, Outcome]:
        """What it says after these tokens. Raises httpx.HTTPError, as `outcomes`."""
        body: dict[str, Any] = {
            "model": self.model,
            "prompt": [*prompt, *begin],
            "max_tokens": max_tokens,
            "temperature": 0,
        }
        answered: dict[Choice, Outcome] = {}
        for choice in choices:
            asked = {**body, "vllm_xargs": choice.xargs()}
            told = _json(self._client.post("/v1/completions", json=asked))
            answered[choice] = self._outcome(told, told["choices"][0]["text"])
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
                # As vLLM takes an answer that has begun; other servers may know another way.
                body["messages"].append({"role": "assistant", "content": sample.cue})
                body |= {"add_generation_prompt": False, "continue_final_message": True}
            told = _json(self._client.post("/v1/chat/completions", json=body))
            text = told["choices"][0]["message"]["content"] or ""
        else:
            body["prompt"] = sample.document
            told = _json(self._client.post("/v1/completions", json=body))
            text = told["choices"][0]["text"]
        outcome = self._outcome(told, text)
        # Several ways to write it in tokens may be the same text.
        if text == self.tokenizer.decode(expected):
            outcome.predicted = expected
        return outcome

    def _outcome(self, told: dict[str, Any], text: str) -> Outcome:
        proof = told.get("kv_compression") or {}
        return Outcome(
            self.tokenizer.encode(text, add_special_tokens=False),
            kept_tokens=proof.get("kept_mean"),
            skipped=proof.get("skipped"),
        )


def _json(response: httpx.Response) -> Any:
    if response.is_error:
        # Its body says why, which the status alone does not.
        raise httpx.HTTPStatusError(
            f"{response.request.url} answers {response.status_code}: {response.text[:500]}",
            request=response.request,
            response=response,
        )
    return response.json()
