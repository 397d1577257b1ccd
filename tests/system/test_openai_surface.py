"""The running application through the OpenAI client: what works, and how it says no."""

import asyncio
import json
from typing import Any

import httpx
import openai
import pytest

from tests.system.deployment import API_KEY, MODEL, Deployment, eventually

QUESTION: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}},
    "required": ["city"],
    "additionalProperties": False,
}


def test_a_chat_answer(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=QUESTION, max_tokens=30)
    assert "Paris" in (answer.choices[0].message.content or "")
    assert answer.usage is not None
    assert answer.usage.prompt_tokens > 20


def test_streaming_equals_not_streaming_at_temperature_0(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {
        "model": MODEL, "messages": QUESTION, "temperature": 0, "max_tokens": 40,
    }  # fmt: skip
    whole = client.chat.completions.create(**options)
    chunks = list(
        client.chat.completions.create(
            **options, stream=True, stream_options={"include_usage": True}
        )
    )
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == whole.choices[0].message.content
    assert len([piece for piece in pieces if piece]) > 1
    streamed = chunks[-1].usage
    assert streamed is not None
    assert whole.usage is not None
    # Their details differ: the second finds the first's prefix.
    assert streamed.prompt_tokens == whole.usage.prompt_tokens
    assert streamed.completion_tokens == whole.usage.completion_tokens


def test_completions_with_n_logprobs_stop_and_seed(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {
        "model": MODEL, "prompt": "One, two, three, four,", "n": 2, "logprobs": 2, "seed": 7,
        "stop": ["seven"], "max_tokens": 16, "temperature": 0.8,
    }  # fmt: skip
    first = client.completions.create(**options)
    assert len(first.choices) == 2
    assert first.choices[0].logprobs is not None
    assert all("seven" not in choice.text for choice in first.choices)
    again = client.completions.create(**options)
    assert [choice.text for choice in again.choices] == [choice.text for choice in first.choices]


def test_json_schema_is_obeyed(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Name a city as JSON."}],
        max_tokens=60,
        temperature=0,
        response_format={"type": "json_schema", "json_schema": {"name": "city", "schema": CITY}},
    )
    assert set(json.loads(answer.choices[0].message.content or "")) == {"city"}


def test_a_named_tool_is_called(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "What is the weather in Paris?"}],
        max_tokens=60,
        temperature=0,
        tools=[
            {
                "type": "function",
                "function": {"name": "weather", "parameters": CITY, "strict": True},
            }
        ],
        tool_choice={"type": "function", "function": {"name": "weather"}},
    )
    calls = answer.choices[0].message.tool_calls
    assert calls is not None
    (call,) = calls
    assert call.type == "function"
    assert call.function.name == "weather"
    assert "city" in json.loads(call.function.arguments)


def test_the_responses_api(client: openai.OpenAI) -> None:
    answer = client.responses.create(
        model=MODEL, input="Say hello.", max_output_tokens=16, temperature=0
    )
    assert answer.output_text


def test_models_tokenize_version_health(deployment: Deployment, client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    tokens = deployment.post("/tokenize", {"model": MODEL, "prompt": "hello world"}).json()
    assert tokens["count"] == len(tokens["tokens"]) == 2
    assert "version" in httpx.get(f"{deployment.base_url}/version").json()
    assert httpx.get(f"{deployment.base_url}/health").status_code == 200


def test_the_request_id_comes_back_and_names_the_answer(deployment: Deployment) -> None:
    headers = {"authorization": f"Bearer {API_KEY}", "x-request-id": "my-id-1"}
    body = {"model": MODEL, "prompt": "a", "max_tokens": 1}
    response = deployment.post("/v1/completions", body, headers=headers)
    assert response.headers.get_list("x-request-id") == ["my-id-1"]
    assert "my-id-1" in response.json()["id"]
    eventually(lambda: "request_id=my-id-1" in deployment.log(), 10, "the id in the log")
    assert response.headers["x-replica-id"] in deployment.occupancy()


BASE = {"model": MODEL, "messages": QUESTION, "max_tokens": 4}
WRONG = {
    "too-long prompt": (400, {**BASE, "messages": [{"role": "user", "content": "a b " * 9000}]}),
    "bad parameter": (400, {**BASE, "temperature": -1}),
    "bad n": (400, {**BASE, "n": 0}),
    "wrong type": (400, {**BASE, "messages": "hello"}),
    "no messages": (400, {"model": MODEL}),
    "unknown model": (404, {**BASE, "model": "gpt-9"}),
    "bad schema": (400, {**BASE, "response_format": {"type": "json_schema"}}),
}


def _assert_error(response: httpx.Response, status: int) -> None:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["message"]
    assert error["type"]
    assert error["code"] == status


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_request_is_an_openai_error(deployment: Deployment, name: str, stream: bool) -> None:
    status, body = WRONG[name]
    _assert_error(deployment.post("/v1/chat/completions", {**body, "stream": stream}), status)


def test_other_refusals_are_openai_errors_too(deployment: Deployment) -> None:
    path = "/v1/chat/completions"
    headers = {"authorization": f"Bearer {API_KEY}", "content-type": "application/json"}
    url = deployment.base_url + path
    _assert_error(httpx.post(url, content=b'{"model":', headers=headers), 400)
    _assert_error(httpx.post(url, json=BASE), 401)
    _assert_error(deployment.post(path, BASE, headers={"authorization": "Bearer no"}), 401)
    _assert_error(deployment.get("/v1/nothing"), 404)
    _assert_error(deployment.get("/v1/models/nothing"), 404)
    _assert_error(deployment.get(path), 405)
    _assert_error(httpx.post(url, content=b" " * (17 << 20), headers=headers), 413)


def test_the_client_library_raises_its_own_exceptions(deployment: Deployment) -> None:
    with pytest.raises(openai.AuthenticationError):
        deployment.client(api_key="wrong").models.list()
    with pytest.raises(openai.NotFoundError):
        deployment.client().models.retrieve("nothing")


def test_an_over_full_queue_is_503_with_retry_after(deployment: Deployment) -> None:
    refused = asyncio.run(_first_refusal(deployment, at_most=40))
    _assert_error(refused, 503)
    assert int(refused.headers["retry-after"]) >= 1
    eventually(lambda: deployment.running() == 0, 30, "the generations stopped")


async def _first_refusal(deployment: Deployment, at_most: int) -> httpx.Response:
    """Sends requests that run for minutes, one after the other, until one is answered."""
    body = {"model": MODEL, "prompt": "Once", "max_tokens": 4000, "ignore_eos": True}
    headers = {"authorization": f"Bearer {API_KEY}"}
    async with httpx.AsyncClient(
        base_url=deployment.base_url, headers=headers, timeout=120
    ) as client:
        tasks: set[asyncio.Task[httpx.Response]] = set()
        # Serve lets some requests too many through if all come at the same instant.
        for _ in range(at_most):
            tasks.add(asyncio.create_task(client.post("/v1/completions", json=body)))
            done, _ = await asyncio.wait(tasks, timeout=0.1, return_when=asyncio.FIRST_COMPLETED)
            if done:
                break
        for task in tasks - done:
            task.cancel()
        await asyncio.wait(tasks)
    assert done, f"{at_most} requests were taken"
    return done.pop().result()


LONG_PROMPT = "The keeper of the lighthouse wrote down every ship that passed. " * 60


def test_a_running_compressed_request_shows_in_the_occupancy(
    deployment: Deployment, client: openai.OpenAI
) -> None:
    stream = client.completions.create(
        model=MODEL, prompt=LONG_PROMPT, max_tokens=2000, stream=True,
        extra_body={"vllm_xargs": {"adakv_budget_tokens": 128}, "ignore_eos": True},
    )  # fmt: skip
    next(iter(stream))

    def told() -> bool:
        return any(
            report.blocks_compressed > 0
            and report.blocks_reserved_growth > 0
            and report.achieved_compression < 0.5
            for report in deployment.occupancy().values()
        )

    eventually(told, 20, "compressed blocks in the ledger")
    stream.close()
    eventually(lambda: deployment.running() == 0, 30, "the generation stopped")
    assert all(report.blocks_compressed == 0 for report in deployment.occupancy().values())


def test_a_long_prompt_is_compressed_and_the_answer_says_so(
    deployment: Deployment, client: openai.OpenAI
) -> None:
    options: dict[str, Any] = {
        "model": MODEL, "prompt": LONG_PROMPT, "max_tokens": 16,
        "extra_body": {"vllm_xargs": {"adakv_budget_tokens": 128}},
    }  # fmt: skip
    whole = client.completions.create(**options).model_dump()["kv_compression"]
    assert whole["policy"] == "kv_compress"
    assert whole["skipped"] is None
    assert whole["kept_mean"] == 128
    assert whole["kept_min"] < 128 < whole["kept_max"]
    assert whole["blocks_after"] == 5
    assert whole["blocks_before"] > 20
    stream = client.completions.create(
        **options, stream=True, stream_options={"include_usage": True}
    )
    *others, last = [chunk.model_dump() for chunk in stream]
    assert last["kv_compression"] == whole
    assert not any("kv_compression" in chunk for chunk in others)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("xargs", "reason"),
    [
        ({"adakv_policy": "ada_snap"}, "known are"),
        ({"adakv_budget_tokens": 3}, "least"),
        ({"adakv_budget_tokens": "many"}, "integer"),
        ({"adakv_keep_ratio": 2}, "less than"),
        ({"adakv_buget_tokens": 300}, "did you mean adakv_budget_tokens"),
        ({"adakv_alpha": 0.5, "adakv_policy": "snapkv"}, "takes no alpha"),
    ],
)
def test_bad_compression_options_are_400(
    deployment: Deployment, xargs: dict[str, Any], reason: str, stream: bool
) -> None:
    body = {"model": MODEL, "prompt": "Once", "stream": stream, "vllm_xargs": xargs}
    response = deployment.post("/v1/completions", body)
    _assert_error(response, 400)
    assert reason in response.json()["error"]["message"]


def test_a_request_may_ask_for_its_whole_cache(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL, prompt=LONG_PROMPT, max_tokens=2,
        extra_body={"vllm_xargs": {"adakv_policy": "full"}},
    )  # fmt: skip
    assert answer.model_dump()["kv_compression"]["skipped"] == "full_requested"


def test_schemas_stop_strings_and_samples_on_a_compressed_cache(client: openai.OpenAI) -> None:
    budget = {"vllm_xargs": {"adakv_budget_tokens": 96}}
    question = [{"role": "user", "content": LONG_PROMPT + "Which city has the lighthouse?"}]
    answer = client.chat.completions.create(
        model=MODEL, messages=question, max_tokens=60, extra_body=budget,
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "city", "schema": CITY, "strict": True},
        },
    )  # fmt: skip
    assert answer.model_dump()["kv_compression"]["skipped"] is None
    assert set(json.loads(answer.choices[0].message.content or "")) == {"city"}
    options: dict[str, Any] = {
        "model": MODEL, "prompt": LONG_PROMPT, "max_tokens": 20, "logprobs": 2,
        "extra_body": budget,
    }  # fmt: skip
    text = client.completions.create(**options).choices[0].text
    stopped = client.completions.create(**options, stop=[text[3:9]])
    assert stopped.choices[0].finish_reason == "stop"
    assert text[3:9] not in stopped.choices[0].text
    assert stopped.model_dump()["kv_compression"]["kept_mean"] == 96
    several = client.completions.create(
        model=MODEL, prompt=LONG_PROMPT, max_tokens=5, n=3, temperature=1.0, extra_body=budget
    )
    assert len(several.choices) == 3
    assert several.model_dump()["kv_compression"]["policy"] == "kv_compress"
