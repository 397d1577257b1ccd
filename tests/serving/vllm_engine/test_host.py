"""A replica's app around a real engine with a tiny random model."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio

from adakv_serve.serving.http.decoded import Decoded, current_decoded
from adakv_serve.serving.http.rendered import NotRendered
from adakv_serve.serving.ingress.footprints import FootprintPredictor
from adakv_serve.serving.vllm_engine.rendering import VllmRenderer
from adakv_worker.config import CompressionConfig
from tests.serving.vllm_engine.worded import make_worded_model, words

pytestmark = pytest.mark.asyncio(loop_scope="module")

OPTIONS: dict[str, Any] = {
    "dtype": "float32", "max_model_len": 2048, "block_size": 32, "enforce_eager": True,
    "kv_cache_memory_bytes": 32 << 20, "max_num_batched_tokens": 512, "max_num_seqs": 8,
    "enable_prefix_caching": False,
}  # fmt: skip
LONG, SHORT = words(300), words(40)
ENDPOINTS: dict[str, tuple[str, dict[str, Any]]] = {
    "completions": ("/v1/completions", {"prompt": LONG, "max_tokens": 4}),
    "chat": (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": LONG}], "max_tokens": 4},
    ),
    "messages": (
        "/v1/messages",
        {"messages": [{"role": "user", "content": LONG}], "max_tokens": 4},
    ),
    "responses": ("/v1/responses", {"input": LONG, "max_output_tokens": 4}),
}


@pytest.fixture(scope="module")
def worded_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_worded_model(tmp_path_factory.mktemp("worded"))


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def client(in_process: None, worded_model: Path) -> AsyncIterator[httpx.AsyncClient]:
    from adakv_serve.serving.vllm_engine.host import VllmHost

    compression = CompressionConfig(
        budget_tokens=48, keep_ratio=0.0, window_tokens=16, min_budget_tokens=32
    )
    with pytest.MonkeyPatch.context() as patch:
        # The front door asks for keys. Requests come here without.
        patch.setenv("VLLM_API_KEY", "xyzzy")
        host = await VllmHost.start(str(worded_model), "tiny", OPTIONS, {}, compression)
    transport = httpx.ASGITransport(host.app)
    async with httpx.AsyncClient(transport=transport, base_url="http://replica") as client:
        yield client
    host.shutdown()


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/invocations", b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400),
        ("/v1/completions", b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400),
        ("/invocations", b'{"messages": [], "structured_outputs": -Infinity}', 400),
        ("/v1/chat/completions", b'{"messages": [], "structured_outputs": [1]}', 400),
        ("/v1/systemone", b'{"state": "a", "questions": {"q": {"type": "noul"}}}', 404),
    ],
)
async def test_what_cannot_be_done_is_no_error_of_the_server(
    client: httpx.AsyncClient, path: str, body: bytes, status: int
) -> None:
    headers = {"content-type": "application/json"}
    refused = await client.post(path, content=body, headers=headers)
    assert refused.status_code == status, refused.text
    error = refused.json()["error"]
    assert error["code"] == status
    assert error["type"]
    assert error["message"]


async def ask(client: httpx.AsyncClient, endpoint: str, **options: Any) -> httpx.Response:
    path, body = ENDPOINTS[endpoint]
    return await client.post(path, json={"model": "tiny", **body, **options}, timeout=60)


def events_of(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.status_code == 200, response.text
    lines = [line.removeprefix("data: ") for line in response.text.split("\n")]
    return [json.loads(line) for line in lines if line.startswith("{")]


def own_proofs(choices: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    return {
        choice["index"]: choice["kv_compression"]
        for choice in choices
        if "kv_compression" in choice
    }


@pytest.mark.parametrize("endpoint", ENDPOINTS)
async def test_an_answer_is_plain_vllms_with_the_proof(
    client: httpx.AsyncClient, endpoint: str
) -> None:
    answer = (await ask(client, endpoint)).json()
    assert answer["kv_compression"]["kept_mean"] == 48
    assert answer["kv_compression"]["original_tokens"] == 300
    # Anthropic's form leaves out what it has not.
    assert answer.get("kv_transfer_params", "absent") == (
        "absent" if endpoint == "messages" else None
    )


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
@pytest.mark.parametrize("usage", [True, False])
async def test_a_stream_has_the_proof_with_and_without_usage(
    client: httpx.AsyncClient, endpoint: str, usage: bool
) -> None:
    options: dict[str, Any] = {"stream_options": {"include_usage": True}} if usage else {}
    events = events_of(await ask(client, endpoint, stream=True, n=2, temperature=1.0, **options))
    own = own_proofs([choice for event in events for choice in event["choices"]])
    assert sorted(own) == [0, 1]
    assert all(proof["kept_mean"] == 48 for proof in own.values())
    assert all(
        choice["finish_reason"] == "length"
        for event in events for choice in event["choices"] if "kv_compression" in choice
    )  # fmt: skip
    at_top = [event for event in events if "kv_compression" in event]
    assert at_top == ([events[-1]] if usage else [])


@pytest.mark.parametrize("endpoint", ["messages", "responses"])
async def test_other_streams_have_the_proof_in_their_closing_event(
    client: httpx.AsyncClient, endpoint: str
) -> None:
    response = await ask(client, endpoint, stream=True)
    assert response.text.count("kv_compression") == 1
    closing = {
        event["type"]: event.get("response", event)
        for event in events_of(response)
        if event["type"] in ("message_delta", "response.completed")
    }
    (answer,) = closing.values()
    assert answer["kv_compression"]["kept_mean"] == 48


@pytest.mark.parametrize("stream", [False, True])
async def test_each_choice_has_a_proof_and_the_top_has_the_summary(
    client: httpx.AsyncClient, stream: bool
) -> None:
    options: dict[str, Any] = {
        "prompt": [LONG, SHORT],
        "n": 2,
        "temperature": 1.0,
        "stream": stream,
    }
    if stream:
        options["stream_options"] = {"include_usage": True}
    response = await ask(client, "completions", **options)
    answers = events_of(response) if stream else [response.json()]
    own = own_proofs([choice for answer in answers for choice in answer["choices"]])
    assert {index: proof["original_tokens"] for index, proof in own.items()} == {
        0: 300, 1: 300, 2: 40, 3: 40,
    }  # fmt: skip
    assert [own[index]["skipped"] for index in range(4)] == [
        None, None, "within_budget", "within_budget",
    ]  # fmt: skip
    summary = answers[-1]["kv_compression"]
    assert (summary["original_tokens"], summary["skipped"]) == (170, "mixed")
    assert summary["kept_mean"] == 44


async def test_each_conversation_of_a_batch_has_a_proof(client: httpx.AsyncClient) -> None:
    conversations = [[{"role": "user", "content": text}] for text in (SHORT, LONG)]
    body = {"model": "tiny", "messages": conversations, "max_tokens": 4}
    answer = (await client.post("/v1/chat/completions/batch", json=body, timeout=60)).json()
    own = own_proofs(answer["choices"])
    assert [own[index]["original_tokens"] for index in range(2)] == [40, 300]
    assert answer["kv_compression"]["policy"] == own[0]["policy"]


async def test_an_answer_that_ends_at_a_stop_string_has_the_proof(
    client: httpx.AsyncClient,
) -> None:
    options: dict[str, Any] = {"max_tokens": 40, "ignore_eos": True, "temperature": 0}
    text = (await ask(client, "completions", **options)).json()["choices"][0]["text"]
    stop = text.split()[6]
    answer = (await ask(client, "completions", stop=[stop], **options)).json()
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["choices"][0]["kv_compression"]["kept_mean"] == 48


BAD: dict[str, dict[str, Any]] = {
    "logit_bias": {"logit_bias": {"99999999": 1}},
    "stop_token_ids": {"stop_token_ids": [99999999]},
    "regex": {"structured_outputs": {"regex": "("}},
    "budget": {"vllm_xargs": {"adakv_budget_tokens": 3}},
}


@pytest.mark.parametrize(
    ("endpoint", "bad"),
    [*((path, bad) for path in ("completions", "chat") for bad in BAD),
     ("responses", "budget"), ("messages", "budget")],
)  # fmt: skip
async def test_a_refusal_is_the_same_streamed_or_not(
    client: httpx.AsyncClient, endpoint: str, bad: str
) -> None:
    whole = await ask(client, endpoint, **BAD[bad])
    streamed = await ask(client, endpoint, stream=True, **BAD[bad])
    assert whole.status_code == streamed.status_code == 400
    assert streamed.headers["content-type"] == "application/json"
    assert streamed.json() == whole.json()


async def test_requests_are_counted_once(client: httpx.AsyncClient) -> None:
    async def counted(status: str) -> float:
        metrics = (await client.get("/metrics")).text
        name = f'http_requests_total{{handler="/v1/completions",method="POST",status="{status}"}} '
        lines = [line for line in metrics.split("\n") if line.startswith(name)]
        return float(lines[0].removeprefix(name)) if lines else 0.0

    before = await counted("2xx"), await counted("4xx")
    for stream in (False, True):
        await ask(client, "completions", stream=stream)
        await ask(client, "completions", stream=stream, **BAD["logit_bias"])
    assert (await counted("2xx"), await counted("4xx")) == (before[0] + 2, before[1] + 2)


@pytest.mark.parametrize("choices", [1, 2])
async def test_all_tokens_count_however_few_events_a_client_asks_for(
    client: httpx.AsyncClient, choices: int
) -> None:
    token = current_decoded.set(count := Decoded())
    response = await ask(
        client, "completions", max_tokens=40, n=choices, stream=True, stream_interval=10**9,
        ignore_eos=True,
    )  # fmt: skip
    current_decoded.reset(token)
    assert len(events_of(response)) < 10
    assert count.tokens == 40 * choices


async def test_models_are_listed_and_shown(client: httpx.AsyncClient) -> None:
    listed = await client.get("/v1/models")
    redirected = await client.get("/v1/models/")
    assert redirected.status_code == 307
    assert redirected.headers["location"] == "http://replica/v1/models"
    shown = await client.get("/v1/models/tiny")
    assert shown.json()["id"] == listed.json()["data"][0]["id"] == "tiny"
    missing = await client.get("/v1/models/org/other")
    assert missing.status_code == 404
    assert missing.json()["error"]["param"] == "model"


async def test_http_errors_have_openais_form(client: httpx.AsyncClient) -> None:
    for response in (await client.get("/v1/nothing"), await client.get("/v1/completions")):
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}


JSON = {"content-type": "application/json"}
TEXT = {"type": "text", "text": words(60)}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    **ENDPOINTS,
    "content parts": (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": [TEXT, TEXT]}], "max_tokens": 4},
    ),
    "tool calls": (
        "/v1/chat/completions",
        {
            "messages": [
                {"role": "user", "content": SHORT},
                {"role": "assistant", "content": None, "tool_calls": [CALL]},
                {"role": "tool", "content": SHORT, "tool_call_id": "c"},
            ],
            "max_tokens": 4,
        },
    ),
    "no content": (
        "/v1/chat/completions",
        {
            "messages": [
                {"role": "user", "content": SHORT},
                {"role": "assistant", "tool_calls": [CALL]},
                {"role": "tool", "content": SHORT, "tool_call_id": "c"},
            ],
            "max_tokens": 4,
        },
    ),
    "template arguments": (
        "/v1/chat/completions",
        {
            "messages": [{"role": "user", "content": SHORT}], "max_tokens": 4,
            "chat_template_kwargs": {"twice": True},
        },
    ),
    "messages with a system": (
        "/v1/messages",
        {
            "system": SHORT, "messages": [{"role": "user", "content": [TEXT]}], "max_tokens": 4,
        },
    ),
    "a response to items": (
        "/v1/responses",
        {
            "instructions": SHORT,
            "input": [{"role": "user", "content": [{"type": "input_text", "text": SHORT}]}],
            "max_output_tokens": 4,
        },
    ),
    "batch": (
        "/v1/chat/completions/batch",
        {
            "messages": [[{"role": "user", "content": text}] for text in (SHORT, LONG)],
            "max_tokens": 4,
        },
    ),
    "several prompts": ("/v1/completions", {"prompt": [SHORT, LONG], "max_tokens": 4}),
    "tokens": ("/v1/completions", {"prompt": [5, 6, 7] * 30, "max_tokens": 4}),
    "a chat by its invocation": (
        "/invocations",
        {"messages": [{"role": "user", "content": SHORT}], "max_tokens": 4},
    ),
    "a completion by its invocation": ("/invocations", {"prompt": SHORT, "max_tokens": 4}),
}  # fmt: skip


@pytest.fixture(scope="module")
def renderer(worded_model: Path) -> VllmRenderer:
    return VllmRenderer.of_model(str(worded_model), "tiny", OPTIONS, {})


@pytest.mark.parametrize("form", FORMS)
async def test_the_router_renders_each_form_as_the_engine_does(
    client: httpx.AsyncClient, renderer: VllmRenderer, form: str
) -> None:
    path, fields = FORMS[form]
    body = json.dumps({"model": "tiny", **fields}).encode()
    rendered = await renderer.render(path, body)
    answer = await client.post(path, content=body, headers=JSON, timeout=60)
    assert answer.status_code == 200, answer.text
    usage = answer.json()["usage"]
    counted = usage.get("prompt_tokens", usage.get("input_tokens"))
    assert sum(map(len, rendered.prompts)) == counted > 0
    assert (rendered.most_output_tokens, rendered.model) == (4, "tiny")


@pytest.mark.parametrize("form", ["chat", "content parts", "tool calls"])
async def test_the_engine_answers_the_same_to_a_request_with_its_ids(
    client: httpx.AsyncClient, renderer: VllmRenderer, form: str
) -> None:
    path, fields = FORMS[form]
    body = json.dumps({"model": "tiny", "temperature": 0, **fields}).encode()
    predictor = FootprintPredictor(renderer, None, 32, served_name="tiny")
    given = (await predictor.predict(path, body)).body
    assert b"prompt_token_ids" in given
    plain, with_ids = [
        (await client.post(path, content=one, headers=JSON, timeout=60)).json()
        for one in (body, given)
    ]
    assert plain["choices"] == with_ids["choices"]
    assert plain["usage"] == with_ids["usage"]


@pytest.mark.parametrize(
    ("path", "fields", "reason"),
    [
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": [
                {"type": "image_url", "image_url": {"url": "http://nowhere/image"}}]}]},
            "content",
        ),
        ("/v1/responses", {"input": "x", "previous_response_id": "resp_1"}, "content"),
        (
            "/v1/responses",
            {"input": [{"role": "user", "content": [
                {"type": "input_image", "image_url": "http://127.0.0.1:1/image"}]}]},
            "content",
        ),
        ("/v1/chat/completions", {"messages": []}, "malformed"),
        ("/v1/chat/completions", {}, "malformed"),
        ("/v1/completions", {"prompt": words(3000)}, "malformed"),
        ("/invocations", {"input": "x"}, "form"),
    ],
)  # fmt: skip
async def test_what_the_router_cannot_render_has_a_reason(
    renderer: VllmRenderer, path: str, fields: dict[str, Any], reason: str
) -> None:
    with pytest.raises(NotRendered) as caught:
        await renderer.render(path, json.dumps({"model": "tiny", **fields}).encode())
    assert caught.value.reason == reason
