"""Footprints predicted in the ingress, by vLLM's own rendering or a simple one."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from adakv_serve.router.footprint import Budget, Footprint, predict, prefix_hashes
from adakv_serve.router.session_hints import session_key
from adakv_serve.serving.config import AppConfig
from adakv_serve.serving.http.rendered import Handling, NotRendered, Rendered
from adakv_serve.serving.ingress.footprints import (
    FootprintPredictor,
    Prediction,
    footprint_predictor,
)
from adakv_serve.serving.ingress.sender import Sender
from adakv_serve.serving.models.embedded import embedded_model_path
from adakv_worker.config import CompressionConfig
from adakv_worker.options import RequestOptions
from adakv_worker.salts import seed_hash, tenant_salt

STORY = "The keeper of the lighthouse wrote down every ship that passed. " * 60
COMPRESSION = CompressionConfig(budget_tokens=256, keep_ratio=0.0)
PATH = "/v1/completions"


class Letters:
    """A renderer whose tokens are letters, which counts its calls."""

    def __init__(self) -> None:
        self.calls = 0
        self.release: asyncio.Event | None = None

    def takes(self, path: str) -> bool:
        return path == PATH

    async def render(self, path: str, body: bytes) -> Rendered:
        self.calls += 1
        if self.release is not None:
            await self.release.wait()
        fields = json.loads(body)
        if "problem" in fields:
            handling = Handling(fields.get("session_id"), fields.get("priority", 0))
            raise NotRendered(fields["problem"], handling=handling)
        prompts = [[ord(letter) for letter in prompt] for prompt in fields["prompts"]]
        return Rendered(
            prompts, fields.get("n", 1), fields.get("most"), fields.get("xargs"),
            fields.get("salt"), fields.get("model"), fields.get("takes_ids", False),
            Handling(fields.get("session_id"), fields.get("priority", 0)),
        )  # fmt: skip


def letters(
    remembered: int = 512, compression: CompressionConfig | None = COMPRESSION
) -> tuple[Letters, FootprintPredictor]:
    renderer = Letters()
    return renderer, FootprintPredictor(
        renderer, compression, 32, 100, "served", remembered, clock=lambda: 0.0
    )


async def asked(predictor: FootprintPredictor, *prompts: str, **fields: Any) -> Prediction:
    return await predictor.predict(PATH, json.dumps({"prompts": prompts, **fields}).encode())


async def footprint(predictor: FootprintPredictor, *prompts: str, **fields: Any) -> Footprint:
    prediction = await asked(predictor, *prompts, **fields)
    assert prediction.footprint is not None
    return prediction.footprint


async def test_a_prompt_is_counted_and_named_by_its_blocks() -> None:
    _, predictor = letters()
    ids = [ord("x")] * 600
    expected = predict(600, 100, Budget(256, 0.0), 32, prefix_hashes(ids, 32))
    assert await footprint(predictor, "x" * 600) == expected


async def test_several_prompts_of_a_request_add_up() -> None:
    _, predictor = letters()
    one, other = [predict(n, 100, Budget(256, 0.0), 32) for n in (600, 50)]
    both = await footprint(predictor, "x" * 50, "y" * 600)
    assert both[:4] == tuple(a + b for a, b in zip(one[:4], other[:4], strict=True))
    assert both.block_hashes == prefix_hashes([ord("y")] * 600, 32)


async def test_the_requests_own_budget_counts() -> None:
    _, predictor = letters()
    small = await footprint(predictor, "x" * 600, xargs={"adakv_budget_tokens": 128})
    full = await footprint(predictor, "x" * 600, xargs={"adakv_policy": "full"})
    assert small[:2] == predict(600, 100, Budget(128, 0.0), 32)[:2]
    assert full[:2] == predict(600, 100, None, 32)[:2]


async def test_prompts_with_another_salt_or_adapter_share_no_blocks() -> None:
    _, predictor = letters()
    prompt, ids = "x" * 64, [ord("x")] * 64
    hashes = {
        (await footprint(predictor, prompt, **fields)).block_hashes
        for fields in ({}, {"salt": "a"}, {"salt": "b"}, {"model": "adapter"})
    }
    assert len(hashes) == 4
    named = await footprint(predictor, prompt, model="served")
    assert named.block_hashes == prefix_hashes(ids, 32)
    salted = await footprint(predictor, prompt, salt="a", model="served")
    assert salted.block_hashes == prefix_hashes(ids, 32, seed_hash("a", None))
    sender = Sender("tenant")
    fields = {"prompts": [prompt], "salt": "a", "model": "served"}
    theirs = (await predictor.predict(PATH, json.dumps(fields).encode(), sender)).footprint
    assert theirs is not None
    seed = seed_hash(tenant_salt("tenant", "a"), None)
    assert theirs.block_hashes == prefix_hashes(ids, 32, seed)


@pytest.mark.parametrize("problem", [{}, {"problem": "content"}])
async def test_a_body_says_whose_turn_it_is_and_how_important_rendered_or_not(
    problem: dict[str, str],
) -> None:
    _, predictor = letters()
    fields = {"prompts": ["x"], "session_id": "a", "priority": 3, **problem}
    sender = Sender("tenant", "b")
    prediction = await predictor.predict(PATH, json.dumps(fields).encode(), sender)
    assert prediction.footprint is not None
    assert prediction.footprint.session == session_key("tenant", "a")
    assert prediction.priority == 3


async def test_the_headers_count_where_no_body_is_rendered() -> None:
    _, predictor = letters()
    sender = Sender("tenant", "b", header_priority=4)
    for fields in ({"problem": "malformed"}, {"prompts": ["word " * 300_000]}):
        prediction = await predictor.predict(PATH, json.dumps(fields).encode(), sender)
        assert prediction.priority == 4
    assert (await predictor.predict("/v1/embeddings", b"{}", sender)).priority == 4


async def test_the_header_names_the_session_of_a_request_that_is_too_long_to_be_read() -> None:
    _, predictor = letters()
    long = json.dumps({"prompts": ["word " * 300_000], "session_id": "a"}).encode()
    prediction = await predictor.predict(PATH, long, Sender(None, "b"))
    assert prediction.footprint is not None
    assert prediction.footprint.session == session_key(None, "b")


async def test_only_the_requests_of_lately_are_remembered() -> None:
    renderer, predictor = letters(remembered=2)
    for prompt, calls in (("a", 1), ("b", 2), ("a", 2), ("c", 3), ("a", 3), ("b", 4)):
        await asked(predictor, prompt)
        assert renderer.calls == calls, prompt


async def test_bounds_choices_and_output_limits_change_the_footprint() -> None:
    bounded = CompressionConfig(
        budget_tokens=256, keep_ratio=0.0, decode_budget_tokens=128, decode_interval_tokens=64
    )
    own = RequestOptions.of(None).budget(bounded)
    budget = Budget(own.budget_tokens, own.keep_ratio, own.decode, own.limit)
    _, predictor = letters(compression=bounded)

    async def predicted(length: int, **fields: Any) -> Footprint:
        one = await footprint(predictor, "x" * length, **fields)
        return one._replace(block_hashes=())

    assert await predicted(601) == predict(601, 100, budget, 32)
    assert await predicted(601) != predict(601, 100, budget._replace(decode=None), 32)
    assert await predicted(601, n=3) == predict(601, 100, budget, 32, answers=3)
    # An answer with a limit stays within the bound, so that the prompt stays uncompressed.
    short = await predicted(61, most=20)
    assert short == predict(61, 20, budget, 32, most_output_tokens=20)
    assert short != predict(61, 20, budget, 32)


async def test_other_paths_have_no_footprint() -> None:
    renderer, predictor = letters()
    body = b'{"prompts": ["x"]}'
    for path in ("/v1/embeddings", f"{PATH}/x", "/"):
        assert await predictor.predict(path, body) == Prediction(None, body)
    assert renderer.calls == 0


async def test_answers_are_learnt_by_the_class_of_their_requests() -> None:
    _, predictor = letters()
    limited = await asked(predictor, "x", most=20)
    assert limited.footprint is not None
    assert limited.footprint.output_tokens == 20
    long, other = await asked(predictor, "x", most=2000), await asked(predictor, "x", model="a")
    assert long.kind != other.kind
    for _ in range(10):
        predictor.note_output(long.kind, 900)
        predictor.note_output(other.kind, 40)
    assert (await footprint(predictor, "y", most=2000)).output_tokens == 900
    assert (await footprint(predictor, "y", most=1100)).output_tokens == 900
    assert (await footprint(predictor, "y", model="a", n=2)).output_tokens == 80
    # For a class without answers, those of all classes count.
    assert (await footprint(predictor, "y", model="b")).output_tokens == 900


async def test_the_engine_gets_the_ids_where_it_takes_them() -> None:
    _, predictor = letters()
    given = await asked(predictor, "ab", takes_ids=True, n=2)
    assert json.loads(given.body) == {
        "kv_transfer_params": {"prompt_token_ids": [97, 98]},
        "prompts": ["ab"], "takes_ids": True, "n": 2,
    }  # fmt: skip
    assert given.answers == 2
    for fields in ({}, {"takes_ids": True, "prompts": ["a", "b"]}):
        body = json.dumps({"prompts": ["ab"], **fields}).encode()
        assert (await predictor.predict(PATH, body)).body is body


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-8"])
async def test_a_body_is_what_it_was_in_each_encoding_of_json(encoding: str) -> None:
    _, predictor = letters()
    body = json.dumps({"prompts": ["ab"], "takes_ids": True}).encode(encoding)
    given = json.loads((await predictor.predict(PATH, body)).body)
    assert (given["prompts"], "kv_transfer_params" in given) == (["ab"], encoding == "utf-8")


@pytest.mark.parametrize(
    "fields", [{"problem": "malformed"}, {"xargs": {"adakv_policy": "no"}, "prompts": ["x"]}]
)
async def test_a_malformed_request_has_no_footprint(fields: dict[str, Any]) -> None:
    _, predictor = letters()
    body = json.dumps(fields).encode()
    assert await predictor.predict(PATH, body) == Prediction(None, body, unknown="malformed")


async def test_what_is_not_rendered_is_estimated_by_its_size() -> None:
    renderer, predictor = letters()
    images = json.dumps({"problem": "content", "data": "x" * 40_000}).encode()
    prediction = await predictor.predict(PATH, images)
    assert (prediction.unknown, prediction.body) == ("content", images)
    assert prediction.footprint == predict(len(images) // 4, 100, Budget(256, 0.0), 32)
    long = json.dumps({"prompts": ["word " * 300_000]}).encode()
    renderer.calls = 0
    prediction = await predictor.predict(PATH, long)
    assert (prediction.unknown, renderer.calls) == ("long", 0)
    assert prediction.footprint is not None
    assert 300_000 < prediction.footprint.prompt_tokens < 500_000
    assert prediction.footprint.block_hashes == ()


async def test_prompts_are_estimated_while_others_are_rendered_that_take_long() -> None:
    renderer, predictor = letters()
    renderer.release = asyncio.Event()
    large = ["x" * 900_000 + letter for letter in "abcde"]
    waiting = [asyncio.create_task(asked(predictor, prompt)) for prompt in large[:4]]
    await asyncio.sleep(0)
    assert (await asked(predictor, large[4])).unknown == "busy"
    predictor._loop.call_soon_threadsafe(renderer.release.set)
    assert [one.unknown for one in await asyncio.gather(*waiting)] == [None] * 4
    assert (await asked(predictor, large[4])).unknown is None


@pytest.fixture(scope="module")
def embedded() -> FootprintPredictor:
    return footprint_predictor(AppConfig.model_validate({"engine": {"block_size": 32}}))


async def test_a_chat_is_counted_with_its_template(embedded: FootprintPredictor) -> None:
    tokenizer = AutoTokenizer.from_pretrained(embedded_model_path())
    messages = [{"role": "user", "content": STORY}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    body = json.dumps({"messages": messages}).encode()
    prediction = await embedded.predict("/v1/chat/completions", body)
    assert prediction.footprint is not None
    assert prediction.footprint.prompt_tokens == len(ids)
    assert prediction.footprint.block_hashes == prefix_hashes(ids, 32)


async def test_a_requests_session_is_found_by_every_form(embedded: FootprintPredictor) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}
    for path, fields in (
        ("/v1/chat/completions", {"messages": messages}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [image]}]}),
        ("/v1/chat/completions/batch", {"messages": [messages, messages]}),
        ("/v1/completions", {"prompt": "Hello"}),
        ("/v1/responses", {"input": "Hello"}),
        ("/v1/messages", {"model": "m", "max_tokens": 5, "messages": messages}),
        ("/invocations", {"messages": messages}),
    ):
        body = json.dumps({**fields, "session_id": "a"}).encode()
        found = (await embedded.predict(path, body)).footprint
        assert found is not None, path
        assert found.session == session_key(None, "a"), path


async def test_the_configured_tokenizer_and_compression_are_used(tmp_path: Path) -> None:
    vocabulary = {"<unk>": 0, "word": 1}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(tmp_path)
    prompt = "word " * 2000
    for args, expected in (
        ({}, predict(2001, 256, None, 16, most_output_tokens=400)),
        (
            {"engine": {"tokenizer": str(tmp_path)}},
            predict(2000, 256, None, 16, most_output_tokens=400),
        ),
        (
            {"compression": {"budget_tokens": 256, "keep_ratio": 0.0},
             "engine": {"block_size": 32}, "routing": {"prior_output_tokens": 50}},
            predict(2001, 50, Budget(256, 0.0), 32, most_output_tokens=400),
        ),
    ):  # fmt: skip
        configured = footprint_predictor(AppConfig.model_validate(args))
        body = json.dumps({"prompt": prompt, "max_tokens": 400}).encode()
        one = (await configured.predict("/v1/completions", body)).footprint
        assert one is not None
        assert one._replace(block_hashes=()) == expected


@pytest.mark.parametrize(
    "body",
    [
        b"{", b"[]", b"{}", b'{"prompt": {}}', b'{"messages": "hello"}',
        b'{"prompt": "x", "vllm_xargs": {"adakv_policy": "no"}}', b'{"prompt": []}',
        b'{"prompt": "x", "n": -1}', b'{"prompt": "x", "max_tokens": -5}',
        b'{"prompt": "x", "n": 1' + b"0" * 400 + b"}",
    ],
)  # fmt: skip
async def test_what_the_engine_refuses_has_no_footprint(
    embedded: FootprintPredictor, body: bytes
) -> None:
    prediction = await embedded.predict("/v1/completions", body)
    assert prediction == Prediction(None, body, unknown="malformed")


async def test_long_prompts_are_remembered_up_to_a_number_of_tokens() -> None:
    renderer = Letters()
    predictor = FootprintPredictor(
        renderer, COMPRESSION, 32, remembered_tokens=1000, clock=lambda: 0.0
    )
    for _ in range(2):
        for letter in "abc":
            await footprint(predictor, letter * 300)
    assert renderer.calls == 3
    await footprint(predictor, "d" * 300)
    await footprint(predictor, "b" * 300)
    assert renderer.calls == 4
    await footprint(predictor, "a" * 300)
    assert renderer.calls == 5
    # One that is longer than all that is kept is rendered each time, and forgets the others.
    for _ in range(2):
        await footprint(predictor, "e" * 1001)
    assert renderer.calls == 7


async def test_a_prompt_is_rendered_anew_in_another_minute() -> None:
    now_s = 59.0
    renderer = Letters()
    predictor = FootprintPredictor(renderer, COMPRESSION, 32, clock=lambda: now_s)
    for now_s in (0.0, 59.0, 60.0, 119.0):  # noqa: B007
        await footprint(predictor, "what day is it?")
    assert renderer.calls == 2
