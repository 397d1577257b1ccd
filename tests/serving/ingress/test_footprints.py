"""Footprints told in the ingress, with the embedded model's own tokenizer."""

import json
from typing import Any

import pytest
from transformers import AutoTokenizer

from adakv_worker.config import CompressionConfig
from router.footprint import Budget, Footprint, OutputLengths, predict, prefix_hashes
from serving.ingress.footprints import FootprintPredictor, OutputCounter
from serving.models.embedded import embedded_model_path

STORY = "The keeper of the lighthouse wrote down every ship that passed. " * 60
COMPRESSION = CompressionConfig(budget_tokens=256, keep_ratio=0.0)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(embedded_model_path())


@pytest.fixture
def predictor(tokenizer: Any) -> FootprintPredictor:
    return FootprintPredictor(tokenizer, COMPRESSION, 32, OutputLengths(prior_tokens=100))


async def chat(predictor: FootprintPredictor, **body: Any) -> Footprint | None:
    return await predictor.footprint("/v1/chat/completions", json.dumps(body).encode())


async def completion(predictor: FootprintPredictor, **body: Any) -> Footprint | None:
    return await predictor.footprint("/v1/completions", json.dumps(body).encode())


async def test_a_chat_is_counted_with_its_template(
    predictor: FootprintPredictor, tokenizer: Any
) -> None:
    messages = [{"role": "user", "content": STORY}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    expected = predict(len(ids), 100, Budget(256, 0.0), 32, prefix_hashes(ids, 32))
    assert await chat(predictor, messages=messages) == expected
    assert await chat(predictor, messages=messages) == expected


async def test_prompts_of_text_tokens_and_lists(
    predictor: FootprintPredictor, tokenizer: Any
) -> None:
    ids = tokenizer.encode(STORY)
    expected = predict(len(ids), 100, Budget(256, 0.0), 32, prefix_hashes(ids, 32))
    assert await completion(predictor, prompt=STORY) == expected
    assert await completion(predictor, prompt=ids) == expected
    two = await completion(predictor, prompt=[STORY, "Hello"])
    assert two is not None
    assert two.prompt_tokens == len(ids) + len(tokenizer.encode("Hello"))


async def test_the_requests_own_budget_counts(
    predictor: FootprintPredictor, tokenizer: Any
) -> None:
    tokens = len(tokenizer.encode(STORY))
    small = await completion(predictor, prompt=STORY, vllm_xargs={"adakv_budget_tokens": 128})
    full = await completion(predictor, prompt=STORY, vllm_xargs={"adakv_policy": "full"})
    assert small is not None
    assert full is not None
    assert small[:2] == predict(tokens, 100, Budget(128, 0.0), 32)[:2]
    assert full[:2] == predict(tokens, 100, None, 32)[:2]


async def test_outputs_are_learnt_and_bounded(predictor: FootprintPredictor) -> None:
    first = await completion(predictor, prompt="Hello", max_tokens=20)
    assert first is not None
    assert first.output_tokens == 20
    for _ in range(10):
        predictor.note_output(40)
    learnt = await completion(predictor, prompt="Hello", n=2)
    assert learnt is not None
    assert learnt.output_tokens == 80


@pytest.mark.parametrize(
    "body",
    [
        b"{", b"[]", b"{}", b'{"prompt": 5}', b'{"messages": "hello"}',
        b'{"prompt": "x", "vllm_xargs": {"adakv_policy": "no"}}',
    ],
)  # fmt: skip
async def test_what_the_engine_will_refuse_has_none(
    predictor: FootprintPredictor, body: bytes
) -> None:
    assert await predictor.footprint("/v1/completions", body) is None
    assert await predictor.footprint("/v1/models", body) is None


async def test_a_huge_prompt_is_guessed(predictor: FootprintPredictor) -> None:
    footprint = await completion(predictor, prompt="word " * 300_000)
    assert footprint is not None
    assert 300_000 < footprint.prompt_tokens < 500_000
    assert footprint.block_hashes == ()


def body(*chunks: bytes) -> list[dict[str, Any]]:
    return [{"type": "http.response.body", "body": chunk} for chunk in chunks]


def test_outputs_are_counted_by_usage_or_events() -> None:
    counter = OutputCounter()
    counter.see([{"type": "http.response.start", "status": 200}])
    counter.see(body(b'data: {"role"}\n\ndata: {"a"}\n\n', b'data: {"b"}\n\n', b"data: [DONE]\n\n"))
    assert counter.tokens == 2
    counter = OutputCounter()
    counter.see(body(b'{"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 17}}'))
    assert counter.tokens == 17
