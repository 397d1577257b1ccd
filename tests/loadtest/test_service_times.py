import shutil
from pathlib import Path
from typing import Any

import httpx
import pytest

from adakv_serve.loadtest.servers.processes import vllm_serve
from adakv_serve.loadtest.service_times import fitted, measure, one_replica
from tests.loadtest.fake_client import fake_client


def test_the_line_through_the_steps_is_what_each_request_adds() -> None:
    times = fitted([900.0, 1100.0, 1000.0], {1: 0.030, 2: 0.032, 4: 0.036})
    assert times == {
        "prefill_tokens_per_s": 1000.0, "decode_step_s": 0.03, "decode_step_s_per_request": 0.002,
    }  # fmt: skip


async def test_prefills_are_alone_and_decodes_in_company() -> None:
    asked: list[dict[str, Any]] = []
    times = await measure(fake_client(asked), repeat=2, company=(1, 3), prompt_sentences=4)
    lengths = [body["max_tokens"] for body in asked]
    assert lengths == [16, 1, 1, *[96] * (2 * 1 + 2 * 3)]
    # No prompt is found in a cache.
    assert len({body["prompt"] for body in asked[:3]}) == 3
    assert times["prefill_tokens_per_s"] > 0


def test_one_replica_is_measured() -> None:
    config = {"applications": [{"name": "llm", "args": {"replica": {"count": 4, "cpus": 1}}}]}
    (application,) = one_replica(config)["applications"]
    assert application == {"name": "llm", "args": {"replica": {"count": 1, "cpus": 1}}}


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.long
async def test_a_real_server_is_measured(gqa_model: Path, tmp_path: Path) -> None:
    from tests.adakv_worker.tiny_models import add_tokenizer

    model = shutil.copytree(gqa_model, tmp_path / "model")
    add_tokenizer(model)
    engine = {
        "dtype": "float32", "max_model_len": 1024, "block_size": 32, "enforce_eager": True,
        "kv_cache_memory_bytes": 64 << 20,
    }  # fmt: skip
    with vllm_serve(str(model), "tiny", engine, 1, tmp_path / "log") as url:
        async with httpx.AsyncClient(base_url=url, timeout=300) as client:
            times = await measure(client, repeat=1, company=(1, 4), prompt_sentences=5)
    assert times["prefill_tokens_per_s"] > 0
    assert times["decode_step_s"] > 0
