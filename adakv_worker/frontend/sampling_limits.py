"""Refuses sampling parameters that raise errors in vLLM's workers, which end the engine."""

from collections.abc import Callable

from vllm import envs
from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.sampling_params import MAX_LOGPROB_TOKEN_IDS, SamplingParams
from vllm.v1.worker.gpu.sample.logit_bias import (
    MAX_NUM_ALLOWED_TOKEN_IDS,
    MAX_NUM_LOGIT_BIAS_TOKENS,
    MAX_NUM_STOP_TOKEN_IDS,
)


def check_for(config: VllmConfig) -> Callable[[SamplingParams], None]:
    """Return a function that raises ValueError for parameters that the workers cannot run."""
    on_v2 = config.use_v2_model_runner
    lora_on_cpu = config.lora_config is not None and current_platform.is_cpu()

    def check(params: SamplingParams) -> None:
        if on_v2:
            check_sizes(params)
        if lora_on_cpu and params.prompt_logprobs is not None:
            raise ValueError("prompt_logprobs: not available on a CPU server with LoRA")

    return check


def check_sizes(params: SamplingParams) -> None:
    """Raise ValueError if the parameters of a request are larger than Model Runner V2 has room for.

    Args:
        params: parameters as the engine gets them, with the tokens of stop and bad words.
    """
    words = params.bad_words_token_ids or []
    stops = params.all_stop_token_ids if params.min_tokens > 0 else ()
    sizes = {
        "allowed_token_ids": (len(params.allowed_token_ids or ()), MAX_NUM_ALLOWED_TOKEN_IDS),
        "logit_bias": (len(params.logit_bias or ()), MAX_NUM_LOGIT_BIAS_TOKENS),
        "stop_token_ids beside min_tokens": (len(stops), MAX_NUM_STOP_TOKEN_IDS),
        "bad_words": (len(words), envs.VLLM_MAX_NUM_BAD_WORDS),
        "bad_words in tokens": (sum(map(len, words)), envs.VLLM_MAX_BAD_WORDS_TOTAL_TOKENS),
        "logprob_token_ids": (len(params.logprob_token_ids or ()), MAX_LOGPROB_TOKEN_IDS),
    }
    for name, (size, most) in sizes.items():
        if size > most:
            raise ValueError(f"{name}: {size} are more than this server takes, {most}")
