"""The running application with compression: what answers say of it, and what must work with it."""

import json
from typing import Any

import openai
import pytest

from tests.system.deployment import MODEL, Deployment
from tests.system.test_openai_surface import CITY, assert_error
from tests.waiting import eventually

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
    assert others[-1]["choices"][0]["kv_compression"] == whole


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
    assert_error(response, 400)
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
    choices = several.model_dump()["choices"]
    assert [choice["kv_compression"]["policy"] for choice in choices] == ["kv_compress"] * 3
    assert several.model_dump()["kv_compression"]["policy"] == "kv_compress"
