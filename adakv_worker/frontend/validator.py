"""Refuses requests at admission, where an error becomes a 400.

It checks the `adakv_*` values, and that all parameters can be sent to the engine's process.
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
from adakv_worker.session_messages import ARRIVAL_KEY, TENANT_KEY

# One for the process, because vLLM loads the class below from an entry point and calls its class
# method without a configuration; the front end never creates an object of it.
_config: CompressionConfig | None = None


def bound_by(config: CompressionConfig | None) -> None:
    """Set the operator's bounds for requests of this process. None removes them."""
    global _config
    _config = config


class RequestOptionsValidator(ForModelRunnerV1, ForModelRunnerV2):
    """Logits processor that changes no logits, because vLLM lets those validate parameters.

    It has both bases because vLLM only starts with plug-ins for its present model runner.
    """

    def __init__(self, vllm_config: VllmConfig, *_: Any) -> None:
        pass

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Raise ValueError for an unknown option, or a bad value or one out of bounds.

        Raise it too for strings and numbers that vLLM would fail to send and answer with 500.
        """
        for name, value in _texts(sampling_params):
            if (where := unencodable(value, name)) is not None:
                raise ValueError(f"{where} has {PROBLEM}")
        if (field := _too_large(sampling_params)) is not None:
            raise ValueError(f"{field} has a whole number of more than 64 bits")
        if sampling_params.extra_args:
            for key in (CONTINUATION_KEY, TENANT_KEY, ARRIVAL_KEY):
                if key in sampling_params.extra_args:
                    raise ValueError(f"{key} cannot be set by requests")
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
    """Yield values with strings, by the client's names for them."""
    yield "stop", params.stop
    yield "bad_words", params.bad_words
    yield "vllm_xargs", params.extra_args
    if (structured := params.structured_outputs) is not None:
        for field in dataclasses.fields(structured):
            yield f"structured_outputs.{field.name}", getattr(structured, field.name)


def _too_large(params: SamplingParams) -> str | None:
    """Return the first field with a number that cannot be sent, by the client's name for it."""
    if _is_sent(params):
        return None
    # vLLM checks `extra_args` itself.
    fields = (name for name in params.__struct_fields__ if not _is_sent(getattr(params, name)))
    return next(fields, "sampling_params")


def _is_sent(value: Any) -> bool:
    try:
        # vLLM has its own encoding for types that msgpack lacks.
        msgspec.msgpack.encode(value, enc_hook=lambda _: None)
    except OverflowError:
        return False
    return True
