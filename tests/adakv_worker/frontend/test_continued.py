"""Requests that begin with tokens of another engine, between a front end and its engine core."""

from typing import Any

import pytest
from vllm.sampling_params import (
    RepetitionDetectionParams,
    SamplingParams,
    StructuredOutputsParams,
)
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest

from adakv_worker.frontend.continued import ContinuedCore
from adakv_worker.messages import Continuation, continuation_in
from tests.adakv_worker.frontend.stub_core import Core, request

ANSWER = [7, 8]


class Front:
    """A front end above a scripted engine core."""

    def __init__(self, *, compressing: bool) -> None:
        self.core = Core()
        self.added: list[EngineCoreRequest] = []
        self.core.on_add = self.added.append
        self.continued = ContinuedCore(self.core, compressing=compressing)

    async def decodes(self, *outputs: EngineCoreOutput) -> list[list[int]]:
        self.core.outputs.put_nowait(EngineCoreOutputs(outputs=list(outputs)))
        got = await self.continued.get_output_async()
        return [output.new_token_ids for output in got.outputs]


@pytest.fixture(params=[True, False], ids=["ours", "stock"])
def front(request: Any) -> Front:
    return Front(compressing=request.param)


def asked(**params: Any) -> EngineCoreRequest:
    return request("asked", sampling_params=SamplingParams(**{"max_tokens": 9, **params}))


async def test_the_first_output_brings_the_tokens_from_elsewhere(front: Front) -> None:
    mine, other = asked(), request("other")
    front.continued.begin_with(mine, ANSWER)
    for one in (mine, other):
        await front.continued.add_request_async(one)
    assert [one.prompt_token_ids for one in front.added] == [[5, 6, 7, 8], [5, 6]]
    # The front end keeps what it has sent.
    assert mine.prompt_token_ids == [5, 6]
    outputs = EngineCoreOutput("other", [1]), EngineCoreOutput("asked", [9])
    assert await front.decodes(*outputs) == [[1], [7, 8, 9]]
    assert await front.decodes(EngineCoreOutput("asked", [10])) == [[10]]


async def test_our_scheduler_learns_where_the_answer_begins() -> None:
    front = Front(compressing=True)
    mine = asked(min_tokens=4, presence_penalty=1.0)
    front.continued.begin_with(mine, ANSWER)
    await front.continued.add_request_async(mine)
    params = front.added[0].sampling_params
    assert params is not None
    assert continuation_in(params) == Continuation(2)
    assert (params.max_tokens, params.min_tokens) == (9, 4)


@pytest.mark.parametrize(("least", "left"), [(4, 2), (1, 0)])
async def test_a_stock_scheduler_gets_limits_of_the_rest(least: int, left: int) -> None:
    front = Front(compressing=False)
    mine = asked(min_tokens=least)
    front.continued.begin_with(mine, ANSWER)
    await front.continued.add_request_async(mine)
    params = front.added[0].sampling_params
    assert params is not None
    assert (params.max_tokens, params.min_tokens) == (7, left)
    assert continuation_in(params) is None
    assert mine.sampling_params is not None
    assert mine.sampling_params.max_tokens == 9


@pytest.mark.parametrize(
    ("options", "ours", "stock"),
    [
        ({}, True, True),
        ({"temperature": 1.0, "seed": 3, "repetition_penalty": 1.2}, True, True),
        ({"stop": ["a"], "stop_token_ids": [3]}, True, True),
        ({"presence_penalty": 0.5}, True, False),
        ({"frequency_penalty": 0.5}, True, False),
        ({"repetition_detection": RepetitionDetectionParams(3, 1, 2)}, True, False),
        ({"logprobs": 0}, False, False),
        ({"prompt_logprobs": 1}, False, False),
        ({"structured_outputs": StructuredOutputsParams(regex="a")}, False, False),
        ({"thinking_token_budget": 5}, False, False),
    ],
)
def test_only_what_is_all_in_its_tokens_goes_on(
    options: dict[str, Any], ours: bool, stock: bool
) -> None:
    for compressing, can in ((True, ours), (False, stock)):
        front = Front(compressing=compressing)
        assert front.continued.can_go_on(asked(**options)) == can
        if not can:
            with pytest.raises(ValueError, match="cannot go on"):
                front.continued.begin_with(asked(**options), ANSWER)


async def test_a_request_that_was_aborted_begins_with_nothing(front: Front) -> None:
    mine = asked()
    front.continued.begin_with(mine, ANSWER)
    await front.continued.add_request_async(mine)
    await front.continued.abort_requests_async(["asked"])
    assert front.core.aborted == ["asked"]
    await front.continued.add_request_async(mine)
    assert await front.decodes(EngineCoreOutput("asked", [1])) == [[1]]


async def test_a_request_that_cannot_be_added_begins_with_nothing(front: Front) -> None:
    def fail(_: EngineCoreRequest) -> None:
        raise ConnectionError

    mine = asked()
    front.continued.begin_with(mine, ANSWER)
    front.core.on_add = fail
    with pytest.raises(ConnectionError):
        await front.continued.add_request_async(mine)
    front.core.on_add = front.added.append
    await front.continued.add_request_async(mine)
    assert front.added[-1].prompt_token_ids == [5, 6]
