"""Footprints predicted in the ingress, with the embedded model's own tokenizer."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from adakv_worker.config import CompressionConfig
from adakv_worker.options import RequestOptions
from router.footprint import Budget, Footprint, OutputQuantiles, predict, prefix_hashes
from serving.config import AppConfig
from serving.ingress.footprints import FootprintPredictor, OutputCounter, footprint_predictor
from serving.models.embedded import embedded_model_path

STORY = "The keeper of the lighthouse wrote down every ship that passed. " * 60
COMPRESSION = CompressionConfig(budget_tokens=256, keep_ratio=0.0)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(embedded_model_path())


@pytest.fixture
def predictor(tokenizer: Any) -> FootprintPredictor:
    return FootprintPredictor(tokenizer, COMPRESSION, 32, OutputQuantiles(prior_tokens=100))


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


TOOL = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object"}},
}


class Counting:
    """A tokenizer of characters that counts its calls and shows the tools in its template."""

    def __init__(self) -> None:
        self.calls = 0

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        self.calls += 1
        return [0] * add_special_tokens + [ord(letter) for letter in text]

    def apply_chat_template(self, messages: Any, tools: Any, **options: Any) -> str:
        assert options == {"add_generation_prompt": True, "tokenize": False}
        return json.dumps([messages, tools])


def counting(
    remembered: int = 512, compression: CompressionConfig | None = COMPRESSION
) -> tuple[Counting, FootprintPredictor]:
    tokenizer = Counting()
    outputs = OutputQuantiles(prior_tokens=100)
    return tokenizer, FootprintPredictor(tokenizer, compression, 32, outputs, remembered)


async def prompt_tokens(predictor: FootprintPredictor, prompt: str) -> int:
    footprint = await completion(predictor, prompt=prompt)
    assert footprint is not None
    return footprint.prompt_tokens


async def test_the_chat_template_gets_the_tools_and_adds_the_special_tokens_itself() -> None:
    _, predictor = counting()
    messages = [{"role": "user", "content": "Hello"}]
    for tools in (None, [TOOL]):
        body = {"messages": messages} | ({"tools": tools} if tools else {})
        footprint = await chat(predictor, **body)
        assert footprint is not None
        assert footprint.prompt_tokens == len(json.dumps([messages, tools]))


async def test_prompts_with_the_same_beginning_are_different() -> None:
    _, predictor = counting()
    assert await prompt_tokens(predictor, "x" * 5000 + "y") == 5002
    assert await prompt_tokens(predictor, "x" * 5000 + "yy") == 5003
    long, other = "x" * 5000 + "a", "x" * 5000 + "b"
    first, second = [await completion(predictor, prompt=text) for text in (long, other)]
    assert first is not None
    assert second is not None
    assert first.block_hashes == second.block_hashes  # The last block is not full.


async def test_only_the_prompts_asked_for_lately_are_remembered() -> None:
    tokenizer, predictor = counting(remembered=2)
    for prompt, calls in (("a", 1), ("b", 2), ("a", 2), ("c", 3), ("a", 3), ("b", 4)):
        await prompt_tokens(predictor, prompt)
        assert tokenizer.calls == calls, prompt


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
async def test_either_name_of_the_output_limit_counts(name: str) -> None:
    _, predictor = counting()
    footprint = await completion(predictor, prompt="Hello", **{name: 20})
    assert footprint is not None
    assert footprint.output_tokens == 20


async def test_the_newer_name_of_the_output_limit_comes_first() -> None:
    _, predictor = counting()
    footprint = await completion(predictor, prompt="x", max_tokens=20, max_completion_tokens=30)
    assert footprint is not None
    assert footprint.output_tokens == 30


async def test_bounds_choices_and_output_limits_change_the_footprint() -> None:
    bounded = CompressionConfig(
        budget_tokens=256, keep_ratio=0.0, decode_budget_tokens=128, decode_interval_tokens=64
    )
    asked = RequestOptions.of(None).budget(bounded)
    budget = Budget(asked.budget_tokens, asked.keep_ratio, asked.decode, asked.limit)
    _, predictor = counting(compression=bounded)

    async def predicted(length: int, **options: Any) -> Footprint:
        footprint = await completion(predictor, prompt="x" * (length - 1), **options)
        assert footprint is not None
        return footprint._replace(block_hashes=())

    assert await predicted(601) == predict(601, 100, budget, 32)
    assert await predicted(601) != predict(601, 100, budget._replace(decode=None), 32)
    assert await predicted(601, n=3) == predict(601, 100, budget, 32, answers=3)
    # An answer with a limit stays within the bound, so that the prompt stays uncompressed.
    short = await predicted(61, max_tokens=20)
    assert short == predict(61, 20, budget, 32, most_output_tokens=20)
    assert short != predict(61, 20, budget, 32)


async def test_other_paths_have_no_footprint() -> None:
    tokenizer, predictor = counting()
    for path in ("/v1/embeddings", "/v1/completions/x", "/"):
        assert await predictor.footprint(path, b'{"prompt": "x"}') is None
    assert tokenizer.calls == 0


async def test_the_configured_tokenizer_and_compression_are_used(
    tokenizer: Any, tmp_path: Path
) -> None:
    vocabulary = {"<unk>": 0, "word": 1}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(tmp_path)
    prompt = "word " * 2000
    for args, expected in (
        ({}, predict(2001, 256, None, 16)),
        ({"engine": {"tokenizer": str(tmp_path)}}, predict(2000, 256, None, 16)),
        ({"compression": {"enabled": False}}, predict(2001, 256, None, 16)),
    ):
        configured = footprint_predictor(AppConfig.model_validate(args))
        footprint = await completion(configured, prompt=prompt)
        assert footprint is not None
        assert footprint._replace(block_hashes=()) == expected
    enabled = AppConfig.model_validate(
        {"compression": {"budget_tokens": 256, "keep_ratio": 0.0}, "engine": {"block_size": 32},
         "routing": {"prior_output_tokens": 50}}
    )  # fmt: skip
    footprint = await completion(footprint_predictor(enabled), prompt=prompt)
    assert footprint is not None
    assert footprint._replace(block_hashes=()) == predict(2001, 50, Budget(256, 0.0), 32)


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
async def test_a_malformed_request_has_no_footprint(
    predictor: FootprintPredictor, body: bytes
) -> None:
    assert await predictor.footprint("/v1/completions", body) is None
    assert await predictor.footprint("/v1/models", body) is None


async def test_the_length_of_a_huge_prompt_is_estimated(predictor: FootprintPredictor) -> None:
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
