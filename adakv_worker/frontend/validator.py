"""Validates sampling parameters at admission, where an error becomes a 400.

The `adakv_*` values of requests, and what could not be sent to the engine's process.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import msgspec
import torch
from vllm.config import VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate
from vllm.v1.sample.logits_processor import LogitsProcessor as ForModelRunnerV1
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as ForModelRunnerV2

from adakv_worker.config import CompressionConfig
from adakv_worker.frontend.encodable import PROBLEM, unencodable
from adakv_worker.messages import CONTINUATION_KEY
from adakv_worker.options import RequestOptions

_config: CompressionConfig | None = None


def bound_by(config: CompressionConfig | None) -> None:
    """Holds this process's requests to the operator's bounds; None: to none."""
    global _config
    _config = config


class RequestOptionsValidator(ForModelRunnerV1, ForModelRunnerV2):
    """Touches no logits: being one is how vLLM lets a plug-in validate sampling parameters.

    An installed plug-in must be one for the model runner at hand, or vLLM does not start.
    """

    def __init__(self, vllm_config: VllmConfig, *_: Any) -> None:
        pass

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Raise ValueError for an unknown option, a bad value, or one out of bounds.

        Also for a string that cannot be encoded and a number that is too large: vLLM would fail to
        send it, and answer 500.
        """
        for name, value in _texts(sampling_params):
            if (where := unencodable(value, name)) is not None:
                raise ValueError(f"{where} has {PROBLEM}")
        if (field := _too_large(sampling_params)) is not None:
            raise ValueError(f"{field} has a whole number of more than 64 bits")
        if sampling_params.extra_args:
            if CONTINUATION_KEY in sampling_params.extra_args:
                raise ValueError(f"{CONTINUATION_KEY} is not for requests to say")
            options = RequestOptions.of(sampling_params.extra_args)
            options.budget(_config or CompressionConfig(min_budget_tokens=1))

    def apply(self, logits: torch.Tensor, *_: Any) -> torch.Tensor:
        return logits

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        return False

    def is_argmax_invariant(self) -> bool:
        return True

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        pass


def _texts(params: SamplingParams) -> Iterator[tuple[str, Any]]:
    """Yield what holds strings of the client's, by the name that the client knows."""
    yield "stop", params.stop
    yield "bad_words", params.bad_words
    yield "vllm_xargs", params.extra_args
    if (structured := params.structured_outputs) is not None:
        for field in dataclasses.fields(structured):
            yield f"structured_outputs.{field.name}", getattr(structured, field.name)


def _too_large(params: SamplingParams) -> str | None:
    """Return the first field, by the client's name, with a number that cannot be sent."""
    if _is_sent(params):
        return None
    # vLLM looks at `extra_args` itself.
    fields = (name for name in params.__struct_fields__ if not _is_sent(getattr(params, name)))
    return next(fields, "sampling_params")


def _is_sent(value: Any) -> bool:
    try:
        # What msgpack has no type for is vLLM's own to send.
        msgspec.msgpack.encode(value, enc_hook=lambda _: None)
    except OverflowError:
        return False
    return True
