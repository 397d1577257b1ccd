"""CUDA graphs without CUDA: a replay does again what was captured, with the metadata of then.

So it sees of a step only what was written where the captured metadata look for it.
"""

from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm.config import CUDAGraphMode
from vllm.platforms.cpu import CpuPlatform
from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager

SIZES = [1, 2, 4]


class Graphs:
    """What has been captured and replayed in an engine on Model Runner V2."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        # Requests in each step that was replayed.
        self.replayed: list[int] = []
        self._metadata: Any = None
        patch.setattr(CpuPlatform, "get_global_graph_pool", lambda *_: None)
        patch.setattr(
            CudaGraphManager, "capture", lambda manager, *args: self._capture(manager, *args)
        )

    def enable(self, runner: Any) -> None:
        """Before the runner has memory: vLLM for CPUs knows of no graphs."""
        config = runner.compilation_config
        config.cudagraph_mode = CUDAGraphMode.FULL_DECODE_ONLY
        config.cudagraph_capture_sizes, config.max_cudagraph_capture_size = SIZES, SIZES[-1]

    def capture(self, runner: Any) -> None:
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
        mine, now = (list(_places(value)) for value in (self._metadata, self._graphs._metadata))
        assert mine == now, "this step's metadata are not where the graph looks for them"
        self._graphs.replayed.append(self._requests)
        self._forward(CUDAGraphMode.NONE)


def _places(value: Any) -> Iterator[tuple[int, torch.Size]]:
    """Where all tensors on the device lie."""
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
