"""Validates the `adakv_*` values of requests at admission, where an error becomes a 400."""

from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.v1.metrics.loggers import StatLoggerBase
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor

from adakv_worker.config import CompressionConfig, RequestOptions, compression_config

_config: CompressionConfig | None = None


class RequestOptionsValidator(LogitsProcessor):
    """Touches no logits: being one is how vLLM lets a plug-in validate sampling parameters."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        pass

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Raises ValueError for an unknown option, a bad value, or one out of bounds."""
        if sampling_params.extra_args:
            options = RequestOptions.of(sampling_params.extra_args)
            options.budget(_config or CompressionConfig(min_budget_tokens=1))

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        return logits

    def is_argmax_invariant(self) -> bool:
        return True

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        pass


class ConfigWatcher(StatLoggerBase):
    """Touches no statistics: being a logger is how a plug-in meets the front end's configuration,
    which the operator's bounds are part of."""

    def __init__(self, vllm_config: VllmConfig, engine_index: int = 0) -> None:
        global _config
        _config = compression_config(vllm_config.additional_config)

    def record(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_engine_initialized(self) -> None:
        pass
