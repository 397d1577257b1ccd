"""What would end an engine in its workers is refused before it is sent."""

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.platforms import current_platform
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest

from adakv_worker.frontend.sampling_limits import check_for, check_sizes
from adakv_worker.frontend.sent_requests import BookedCore, SentRequests
from tests.adakv_worker.frontend.stub_core import Core, request


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"allowed_token_ids": list(range(1025))}, "allowed_token_ids"),
        ({"logit_bias": dict.fromkeys(range(1025), 1.0)}, "logit_bias"),
        ({"stop_token_ids": list(range(129)), "min_tokens": 1}, "stop_token_ids"),
        ({"logprob_token_ids": list(range(10_000))}, "logprob_token_ids"),
    ],
)
def test_what_is_too_large_is_refused_by_name(values: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}.*more than"):
        check_sizes(SamplingParams(**values))


def test_what_the_runner_takes_passes() -> None:
    check_sizes(SamplingParams())
    check_sizes(SamplingParams(logit_bias=dict.fromkeys(range(1024), 1.0)))
    # Without a least length they are the front end's alone.
    check_sizes(SamplingParams(stop_token_ids=list(range(200))))


async def test_what_is_refused_is_not_sent() -> None:
    core, sent = Core(), SentRequests()
    added: list[EngineCoreRequest] = []
    core.on_add = added.append
    params = SamplingParams(stop_token_ids=list(range(129)), min_tokens=1)
    refused = request("r", sampling_params=params)
    with pytest.raises(ValueError, match="stop_token_ids"):
        await BookedCore(core, sent, check_sizes).add_request_async(refused)
    assert not added
    assert not sent.unseen()


@pytest.mark.parametrize("with_lora", [False, True])
def test_prompt_logprobs_beside_lora_are_refused_on_cpus(with_lora: bool) -> None:
    config: Any = SimpleNamespace(
        use_v2_model_runner=False, lora_config=object() if with_lora else None
    )
    check, params = check_for(config), SamplingParams(prompt_logprobs=1)
    if not with_lora or not current_platform.is_cpu():
        check(params)
        return
    with pytest.raises(ValueError, match="prompt_logprobs"):
        check(params)
