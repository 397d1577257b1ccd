"""vLLM's own server with the documented flags, over HTTP."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from adakv_serve.loadtest.servers.processes import vllm_serve
from adakv_serve.serving.models.embedded import EMBEDDED_MODEL_NAME, embedded_model_path
from adakv_worker.plugin import engine_args

PROMPT = "The keeper of the lighthouse wrote down every ship that passed. " * 40
ENGINE = {
    "dtype": "float32", "max_model_len": 2048, "block_size": 32, "enforce_eager": True,
    "kv_cache_memory_bytes": 190 << 20, "max_num_batched_tokens": 1024,
    "enable_prompt_tokens_details": True,
    **engine_args(
        {
            "budget_tokens": 256, "keep_ratio": 0.0, "max_budget_tokens": 512,
            # Less than an exact hit of the first prompt leaves.
            "sessions": {"enabled": True, "min_saved_tokens": 8},
        }
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log = tmp_path_factory.mktemp("vllm_serve") / "log"
    model = str(embedded_model_path())
    with vllm_serve(model, EMBEDDED_MODEL_NAME, ENGINE, threads=1, log_path=Path(log)) as url:
        yield url


def _ask(url: str, **options: Any) -> httpx.Response:
    body = {"model": EMBEDDED_MODEL_NAME, "prompt": PROMPT, "max_tokens": 16, **options}
    return httpx.post(f"{url}/v1/completions", json=body, timeout=120)


def test_the_proof_is_in_kv_transfer_params(url: str) -> None:
    answer = _ask(url).json()
    proof = answer["kv_transfer_params"]["kv_compression"]
    assert proof["policy"] == "defensive"
    assert proof["original_tokens"] == answer["usage"]["prompt_tokens"]
    assert proof["kept_mean"] == 256
    assert proof["kept_min"] < 256 < proof["kept_max"]
    assert proof["blocks_after"] < proof["blocks_before"]
    assert proof["skipped"] is None


def test_a_request_sets_its_own_budget(url: str) -> None:
    answer = _ask(url, vllm_xargs={"adakv_budget_tokens": 128, "adakv_policy": "snapkv"}).json()
    proof = answer["kv_transfer_params"]["kv_compression"]
    assert (proof["policy"], proof["kept_mean"], proof["kept_min"]) == ("snapkv", 128, 128)
    full = _ask(url, vllm_xargs={"adakv_policy": "full"}).json()
    assert full["kv_transfer_params"]["kv_compression"]["skipped"] == "full_requested"


def test_the_next_turn_of_a_chat_goes_on_from_the_cache(url: str) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        said: list[Any] = [{"role": "user", "content": f"Keep this log. {PROMPT}"}]
        before = _metrics(url)
        first = _turn(client, said)
        said += [{"role": "user", "content": "Which ship passed first?"}]
        second = _turn(client, said)
    session = second["kv_transfer_params"]["kv_compression"]["session"]
    assert (session["turn"], session["source"]) == (2, "pool")
    # The client sends the answer as text: its tokens may be others, but not many.
    answered = first["usage"]["prompt_tokens"] + first["usage"]["completion_tokens"] - 1
    assert answered - 8 <= session["resumed_tokens"] <= answered
    usage = second["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == session["resumed_tokens"]
    assert session["resumed_tokens"] + session["computed_tokens"] == usage["prompt_tokens"]
    after = _metrics(url)
    resumed = after["adakv_resumed_tokens_total"] - before.get("adakv_resumed_tokens_total", 0)
    assert resumed == session["resumed_tokens"]
    assert after["adakv_sessions_held"] >= 1
    assert after["adakv_held_blocks"] >= 256 // 32


def _turn(client: openai.OpenAI, said: list[Any]) -> dict[str, Any]:
    """Ask the next turn of a conversation, and note the answer in it."""
    answer = client.chat.completions.create(
        model=EMBEDDED_MODEL_NAME, messages=said, max_tokens=16, temperature=0
    )
    said += [{"role": "assistant", "content": answer.choices[0].message.content}]
    return answer.model_dump()


def _metrics(url: str, **labels: str) -> dict[str, float]:
    """Return our metrics, summed over samples that have `labels` or lack these names."""
    sums: dict[str, float] = {}
    for family in text_string_to_metric_families(httpx.get(f"{url}/metrics", timeout=30).text):
        for sample in family.samples:
            known = all(sample.labels.get(name, value) == value for name, value in labels.items())
            if sample.name.startswith("adakv_") and known:
                sums[sample.name] = sums.get(sample.name, 0) + sample.value
    return sums


def test_metrics_count_compressions(url: str) -> None:
    _ask(url)
    before = _metrics(url, skipped="no")
    proof = _ask(url).json()["kv_transfer_params"]["kv_compression"]
    after = _metrics(url, skipped="no")
    grown = {name: after[name] - before[name] for name in after}
    assert grown["adakv_requests_total"] == grown["adakv_kept_share_count"] == 1
    assert grown["adakv_original_tokens_total"] == proof["original_tokens"]
    assert grown["adakv_kept_tokens_total"] == proof["kept_mean"]
    assert grown["adakv_freed_blocks_total"] == proof["blocks_before"] - proof["blocks_after"]
    assert grown["adakv_blocks_after_sum"] == proof["blocks_after"]


def test_metrics_count_evictions_while_decoding(url: str) -> None:
    before = _metrics(url).get("adakv_decode_evictions_total", 0)
    bound = {"adakv_decode_budget_tokens": 64, "adakv_decode_interval_tokens": 32}
    options = {**bound, "adakv_window_tokens": 16}
    proof = _ask(url, vllm_xargs=options, max_tokens=70, ignore_eos=True).json()[
        "kv_transfer_params"
    ]["kv_compression"]
    assert proof["decode_evictions"] == 2
    assert {name: proof[name.removeprefix("adakv_")] for name in bound} == bound
    assert _metrics(url)["adakv_decode_evictions_total"] == before + 2


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"adakv_budget_tokens": 1024}, "above this server's most, 512"),
        ({"adakv_budget_tokens": "many"}, "adakv_budget_tokens"),
        ({"adakv_polcy": "snapkv"}, "did you mean adakv_policy"),
        ({"adakv_policy": "best"}, "unknown policy 'best'"),
        ({"adakv_window_tokens": 300}, "above this server's most, 32"),
        ({"adakv_decode_budget_tokens": 1024}, "above this server's most, 512"),
        ({"adakv_decode_interval_tokens": 64}, "there is no adakv_decode_budget_tokens"),
    ],
)
def test_a_bad_option_is_a_400_and_the_engine_lives(
    url: str, options: dict[str, Any], reason: str
) -> None:
    refused = _ask(url, vllm_xargs=options)
    assert refused.status_code == 400
    assert reason in refused.json()["error"]["message"]
    assert _ask(url, prompt="Once", max_tokens=2).status_code == 200
