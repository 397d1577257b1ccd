"""Tokens of passing answers, counted by what the server wrote into them."""

import json
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.entrypoints.openai.responses.protocol import (
    InputTokensDetails,
    OutputTokensDetails,
    ResponsesRequest,
    ResponsesResponse,
    ResponseUsage,
)

from adakv_serve.serving.ingress.output_counter import OutputCounter


def counted(*chunks: bytes) -> int:
    counter = OutputCounter()
    counter.see([{"type": "http.response.start", "status": 200}])
    counter.see([{"type": "http.response.body", "body": chunk} for chunk in chunks])
    return counter.tokens


def test_events_are_counted_without_usage() -> None:
    role, text = b'data: {"role"}\n\ndata: {"a"}\n\n', b'data: {"b\\ndata: "}\n\n'
    assert counted(role, text, b"data: [DONE]\n\n") == 2


def test_what_the_engine_counts_is_worth_more_than_what_a_body_tells() -> None:
    counter = OutputCounter()
    counter.see(
        [{"type": "http.response.body", "body": b'data: {"usage": {"output_tokens": 9}}'}], 4
    )
    assert counter.tokens == 4
    counter.see([{"type": "http.response.body", "body": b"data: [DONE]"}])
    assert counter.tokens == 4
    counter.see([{"type": "http.response.body", "body": b""}], 64)
    assert counter.tokens == 64


@pytest.mark.parametrize("name", ["completion_tokens", "output_tokens"])
def test_usage_is_counted_by_either_name(name: str) -> None:
    usage = {"prompt_tokens": 5, name: 17, "output_tokens_details": {"reasoning_tokens": 3}}
    for separators in ((",", ":"), (", ", ": ")):
        answer = json.dumps({"choices": [], "usage": usage}, separators=separators).encode()
        assert counted(answer) == 17
        assert counted(b"data: " + answer + b"\n\n") == 17


def test_a_later_usage_of_a_stream_takes_the_place_of_earlier_ones() -> None:
    assert counted(*(b'data: {"usage":{"completion_tokens":%d}}\n\n' % n for n in (1, 2, 3))) == 3


@pytest.mark.parametrize("usage", ["null", "{", '{"completion_tokens": "9"}', "[1]", "{}"])
def test_what_is_no_usage_counts_nothing(usage: str) -> None:
    assert counted(f'{{"usage": {usage}'.encode()) == 0


def _response(usage: ResponseUsage | None, parameters: dict[str, Any]) -> bytes:
    tool = {"type": "function", "name": "f", "strict": False, "parameters": parameters}
    request = ResponsesRequest(
        model="m", input="hi", tool_choice="none", tools=[tool],
        metadata={"usage": "{}", "output_tokens": "1"},
    )  # fmt: skip
    answer = ResponsesResponse.from_request(
        request, SamplingParams(max_tokens=10), model_name="m", created_time=1, output=[],
        status="completed", usage=usage,
    )  # fmt: skip
    return json.dumps(answer.model_dump(mode="json", by_alias=True)).encode()


@pytest.mark.parametrize("number", [0, 1, 10**20, 10**400], ids=["0", "1", "10^20", "10^400"])
def test_a_client_cannot_choose_what_its_answer_counts(number: int) -> None:
    usage = ResponseUsage(
        input_tokens=5, output_tokens=800, total_tokens=805,
        input_tokens_details=InputTokensDetails(cached_tokens=0, cache_write_tokens=0),
        output_tokens_details=OutputTokensDetails(reasoning_tokens=0),
    )  # fmt: skip
    chosen = {"output_tokens": number, "usage": {"output_tokens": number}}
    assert counted(_response(usage, chosen)) == 800
    begun = b'data: {"type":"response.created","response":' + _response(None, chosen) + b"}\n\n"
    assert counted(begun) == 0
