"""Requests that may leave an engine, and those that have to stay."""

from typing import Any

import pytest
import torch
from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams, StructuredOutputsParams

from adakv_worker.frontend.moving import Movable
from tests.adakv_worker.frontend.stub_core import PROOF, Front
from tests.adakv_worker.proofs import make_proof


def params(**options: Any) -> dict[str, Any]:
    return {"sampling_params": SamplingParams(max_tokens=9, **options)}


async def test_a_compressed_request_may_leave() -> None:
    front = Front()
    await front.asks(**params(temperature=1.0, seed=3, logprobs=2, min_tokens=2, stop=["x"]))
    assert front.moving.movable() == [Movable("asked", tokens=3, tokens_left=8, proof=PROOF)]


@pytest.mark.parametrize(
    "fields",
    [
        params(structured_outputs=StructuredOutputsParams(regex="a+")),
        params(prompt_logprobs=1),
        params(thinking_token_budget=5),
        {"prompt_token_ids": None, "prompt_embeds": torch.zeros(2, 4)},
        {"prompt_embeds": torch.zeros(2, 4)},
        {"lora_request": LoRARequest("adapter", 1, "/nowhere")},
        {"mm_features": [object()]},
        {"resumable": True},
        {"proof": None},
        {"proof": make_proof(skipped="short")},
    ],
    ids=[
        "structured output", "prompt log-probabilities", "thinking budget", "embeddings",
        "tokens and embeddings", "LoRA", "multi-modal", "resumable", "not compressed yet",
        "not compressed at all",
    ],
)  # fmt: skip
async def test_a_request_with_more_state_than_its_cache_stays(fields: dict[str, Any]) -> None:
    front = Front()
    await front.asks(**fields)
    front.core.answer = [[5, 6, 7]]
    assert front.moving.movable() == []
    assert await front.moving.leave("asked", "/nowhere") is None
    assert not front.core.called.is_set()


async def test_a_request_leaves_once() -> None:
    front = Front()
    await front.asks()
    front.core.answer = [[5, 6, 7]]
    assert await front.moving.leave("asked", "/nowhere") is not None
    assert await front.moving.leave("asked", "/nowhere") is None
    assert front.moving.movable() == []


async def test_a_request_whose_cache_and_stream_differ_stays() -> None:
    front = Front()
    await front.asks()
    front.core.answer = [[5, 6, 8]]
    with pytest.raises(RuntimeError, match="different tokens"):
        await front.moving.leave("asked", "/nowhere")
    assert not front.moving.is_away("asked")
    assert len(front.moving.movable()) == 1


async def test_a_request_stays_when_ranks_export_different_tokens() -> None:
    front = Front()
    await front.asks()
    front.core.answer = [[5, 6, 7], None]
    assert await front.moving.leave("asked", "/nowhere") is None
    assert not front.moving.is_away("asked")
