"""CUDA graphs without CUDA: a replay repeats the captured calls with their original metadata.

So a replay reads of a step only data written at the captured addresses.
"""

from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm.config import CUDAGraphMode
from vllm.forward_context import BatchDescriptor, get_forward_context
from vllm.platforms.cpu import CpuPlatform
from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from adakv_worker.attention.folding import WithStep

SIZES = [1, 2, 4]


class Graphs:
    """Captured and replayed graphs of an engine."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        # Requests in each step that was replayed.
        self.replayed: list[int] = []
        self._metadata: Any = None
        patch.setattr(CpuPlatform, "get_global_graph_pool", lambda *_: None)
        patch.setattr(torch.accelerator, "synchronize", lambda *_: None)
        patch.setattr(
            CudaGraphManager, "capture", lambda manager, *args: self._capture(manager, *args)
        )

    def enable(self, runner: Any) -> None:
        """Turn graphs on, which vLLM for CPUs lacks; call before the runner has memory."""
        config = runner.compilation_config
        config.cudagraph_mode = CUDAGraphMode.FULL_DECODE_ONLY
        config.cudagraph_capture_sizes, config.max_cudagraph_capture_size = SIZES, SIZES[-1]

    def capture(self, runner: Any) -> None:
        if isinstance(runner, GPUModelRunner):
            self._capture_v1(runner)
        else:
            self._capture_v2(runner)

    def _capture_v1(self, runner: Any) -> None:
        # vLLM wraps the model, and picks a graph by the batch.
        forward, graphs = runner.model.forward, {}
        folds: list[bool] = []

        def wrapped(**inputs: Any) -> Any:
            context = get_forward_context()
            if context.cudagraph_runtime_mode is not CUDAGraphMode.FULL:
                folds.append(_folds(context.attn_metadata))
                return forward(**inputs)
            # A capture may call only kernels that were called before: the first call loads them.
            assert context.batch_descriptor in graphs or folds[-1]
            now = context.attn_metadata, context.slot_mapping, inputs
            captured = graphs.setdefault(context.batch_descriptor, now)
            assert_same_places(captured, now)
            self.replayed.append(context.batch_descriptor.num_tokens)
            context.attn_metadata, context.slot_mapping, inputs = captured
            return forward(**inputs)

        runner.model.forward = wrapped
        for size in SIZES:
            desc = BatchDescriptor(size, size, uniform=True)
            runner._warmup_and_capture(desc, CUDAGraphMode.FULL, num_warmups=1)
        self.replayed.clear()

    def _capture_v2(self, runner: Any) -> None:
        state, made = runner.model_state, runner.model_state.prepare_attn

        def noted(*args: Any, **kwargs: Any) -> Any:
            self._metadata = made(*args, **kwargs)
            return self._metadata

        state.prepare_attn = noted
        runner.cudagraph_manager.capture(
            runner.model, state, runner.input_buffers, None, runner.block_tables,
            runner.attn_groups, runner.kv_cache_config,
        )  # fmt: skip

    def _capture(self, manager: Any, create_forward: Callable[..., Any], *_: Any) -> None:
        for size in manager._capture_descs[CUDAGraphMode.FULL]:
            create_forward(size, warmup=True)(CUDAGraphMode.NONE)
            forward = create_forward(size, warmup=False)
            manager.graphs[size] = _Graph(self, size.num_reqs, forward, self._metadata)
        manager._graphs_captured = True


class _Graph:
    def __init__(
        self, graphs: Graphs, requests: int, forward: Callable[..., Any], metadata: Any
    ) -> None:
        self._graphs, self._requests = graphs, requests
        self._forward, self._metadata = forward, metadata

    def replay(self) -> None:
        assert_same_places(self._metadata, self._graphs._metadata)
        self._graphs.replayed.append(self._requests)
        self._forward(CUDAGraphMode.NONE)


def _folds(metadata: Any) -> bool:
    """Return whether attention with these metadata has folded rows."""
    each = metadata.values() if isinstance(metadata, dict) else ()
    steps = [one.step for one in each if isinstance(one, WithStep)]
    return any(step is not None and step.folded is not None for step in steps)


def assert_same_places(captured: Any, now: Any) -> None:
    """Assert that a step's metadata lie at the captured addresses."""
    assert list(_places(captured)) == list(_places(now))


def _places(value: Any) -> Iterator[tuple[int, torch.Size]]:
    """Yield address and shape of each tensor."""
    if isinstance(value, Tensor):
        yield value.data_ptr(), value.shape
    elif isinstance(value, dict):
        for each in value.values():
            yield from _places(each)
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from _places(each)
    elif is_dataclass(value):
        for field in fields(value):
            yield from _places(getattr(value, field.name))
