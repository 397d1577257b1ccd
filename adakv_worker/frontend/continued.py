"""Answers that another engine has begun: here they go on as if they had been decoded here.

The front end gets the tokens from elsewhere with the first that is decoded here. So its text, stop
strings, limits and usage are those of the whole answer.
"""

from collections.abc import Sequence
from typing import Any

import msgspec
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreOutputs, EngineCoreRequest

from adakv_worker.frontend.movable_requests import continued, is_all_tokens
from adakv_worker.messages import Continuation


class ContinuedCore:
    """Stands in for an engine core's client, below what moves requests between engines."""

    def __init__(self, core: Any, *, compressing: bool) -> None:
        """
        Args:
            compressing: whether the scheduler is `AdaKVScheduler`, which keeps prompt and answer
                apart.
        """
        self._core = core
        self._compressing = compressing
        # Tokens from elsewhere of requests that have no output yet.
        self._begun: dict[str, list[int]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._core, name)

    def can_go_on(self, request: EngineCoreRequest) -> bool:
        """Return whether an engine like this one could go on with a request from its tokens."""
        params = request.sampling_params
        if params is None or not is_all_tokens(request):
            return False
        return params.logprobs is None and (self._compressing or _forgets_its_answer(params))

    def begin_with(self, request: EngineCoreRequest, tokens: Sequence[int]) -> None:
        """Have a request begin with tokens of its answer; call it before the request is added.

        Raises:
            ValueError: it cannot go on from tokens.
        """
        if not self.can_go_on(request):
            raise ValueError("this request cannot go on from tokens of its answer")
        self._begun[request.request_id] = list(tokens)

    async def add_request_async(self, request: EngineCoreRequest) -> None:
        begun = self._begun.get(request.request_id)
        try:
            await self._core.add_request_async(self._with_answer(request, begun or []))
        except BaseException:
            self._begun.pop(request.request_id, None)
            raise

    async def abort_requests_async(self, request_ids: list[str]) -> None:
        for request_id in request_ids:
            self._begun.pop(request_id, None)
        await self._core.abort_requests_async(request_ids)

    async def get_output_async(self) -> EngineCoreOutputs:
        outputs: EngineCoreOutputs = await self._core.get_output_async()
        if self._begun:
            for output in outputs.outputs:
                begun = self._begun.pop(output.request_id, [])
                output.new_token_ids = [*begun, *output.new_token_ids]
        return outputs

    def _with_answer(self, request: EngineCoreRequest, answer: list[int]) -> EngineCoreRequest:
        if not answer:
            return request
        prompt = request.prompt_token_ids or []
        tokens = [*prompt, *answer]
        if self._compressing:
            return continued(request, request.request_id, tokens, Continuation(len(prompt)))
        assert request.sampling_params is not None
        params = request.sampling_params.clone()
        if params.max_tokens is not None:
            params.max_tokens -= len(answer)
        params.min_tokens = max(0, params.min_tokens - len(answer))
        return msgspec.structs.replace(request, prompt_token_ids=tokens, sampling_params=params)


def _forgets_its_answer(params: SamplingParams) -> bool:
    """Return whether the next token is chosen alike if the answer so far counts as prompt."""
    return (
        params.presence_penalty == 0
        and params.frequency_penalty == 0
        and not params.bad_words
        and params.repetition_detection is None
    )
