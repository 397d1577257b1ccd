"""The running application through the OpenAI client: what works, and how it says no."""

import asyncio
import json
from typing import Any

import httpx
import openai
import pytest

from tests.system.deployment import API_KEY, MODEL, Deployment
from tests.waiting import eventually

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
    redirected = deployment.get("/v1/models/")
    assert redirected.status_code == 307
    assert redirected.headers["location"] == f"{deployment.base_url}/v1/models"
    tokens = deployment.post("/tokenize", {"model": MODEL, "prompt": "hello world"}).json()
    assert tokens["count"] == len(tokens["tokens"]) == 2
    assert "version" in httpx.get(f"{deployment.base_url}/version").json()
    assert httpx.get(f"{deployment.base_url}/health").status_code == 200


def test_answers_are_counted_where_the_metrics_are(
    deployment: Deployment, client: openai.OpenAI
) -> None:
    client.completions.create(model=MODEL, prompt="a", max_tokens=1)
    eventually(
        lambda: "ray_http_requests_total" in deployment.metric_names(), 60, "counted requests"
    )


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
    # These the engine refuses, not the endpoint.
    "biased unknown token": (400, {**BASE, "logit_bias": {"99999999": 1}}),
    "too many log-probabilities": (400, {**BASE, "logprobs": True, "top_logprobs": 21}),
    "bad pattern": (400, {**BASE, "structured_outputs": {"regex": "("}}),
    "list for structured outputs": (400, {**BASE, "structured_outputs": ["a", "b"]}),
    "number for structured outputs": (400, {**BASE, "structured_outputs": 1}),
    "unknown stop token": (400, {**BASE, "stop_token_ids": [99999999]}),
}


def assert_error(response: httpx.Response, status: int) -> None:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["message"]
    assert error["type"]
    assert error["code"] == status


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_request_is_an_openai_error(deployment: Deployment, name: str, stream: bool) -> None:
    status, body = WRONG[name]
    assert_error(deployment.post("/v1/chat/completions", {**body, "stream": stream}), status)


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_as_long_as_the_context_is_refused_with_the_limit(
    deployment: Deployment, stream: bool
) -> None:
    body = {"model": MODEL, "prompt": [17] * 8192, "max_tokens": 1, "stream": stream}
    refused = deployment.post("/v1/completions", body)
    assert_error(refused, 400)
    assert "8192" in refused.json()["error"]["message"]


def test_other_refusals_are_openai_errors_too(deployment: Deployment) -> None:
    path = "/v1/chat/completions"
    headers = {"authorization": f"Bearer {API_KEY}", "content-type": "application/json"}
    url = deployment.base_url + path
    assert_error(httpx.post(url, content=b'{"model":', headers=headers), 400)
    assert_error(httpx.post(url, json=BASE), 401)
    assert_error(deployment.post(path, BASE, headers={"authorization": "Bearer no"}), 401)
    assert_error(deployment.get("/v1/nothing"), 404)
    assert_error(deployment.get("/v1/models/nothing"), 404)
    assert_error(deployment.get("/metrics"), 404)
    assert_error(deployment.get(path), 405)
    assert_error(httpx.post(url, content=b" " * (17 << 20), headers=headers), 413)


def test_the_client_library_raises_its_own_exceptions(deployment: Deployment) -> None:
    with pytest.raises(openai.AuthenticationError):
        deployment.client(api_key="wrong").models.list()
    with pytest.raises(openai.NotFoundError):
        deployment.client().models.retrieve("nothing")


def test_an_over_full_queue_is_503_with_retry_after(deployment: Deployment) -> None:
    refused = asyncio.run(_first_refusal(deployment, at_most=40))
    assert_error(refused, 503)
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
