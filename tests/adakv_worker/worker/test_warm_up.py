"""The warm-up leaves nothing behind."""

from collections.abc import Callable

import pytest
import torch

from adakv_serve.kernels.paging.host_tables import HostTables
from adakv_serve.kernels.paging.layout import PageLayout
from adakv_serve.kernels.paging.paged_cache import PagedCache
from adakv_serve.kernels.paging.pages import PageTables
from adakv_serve.kernels.policies.rotary import Rotary
from adakv_worker.config import CompressionConfig
from adakv_worker.worker.model_parts import LayerParts
from adakv_worker.worker.requests import CompressionState
from adakv_worker.worker.warm_up import warm_up

LAYERS, HEADS, GROUP, DIM, PAGE = 2, 2, 2, 16, 32


def make_state(
    blocks: int, tables: Callable[[PageLayout, int, int], PageTables] = HostTables
) -> CompressionState:
    layout = PageLayout.blocks_outermost(LAYERS, HEADS)
    keys, values = torch.zeros((2, blocks * LAYERS * HEADS, PAGE, DIM))
    weight = torch.ones((8, HEADS * GROUP * DIM))
    rotary = Rotary(100.0 ** -(torch.arange(0, DIM, 2) / DIM))
    parts = [
        LayerParts(
            layer, HEADS * GROUP, HEADS, DIM, 0.25, rotary,
            lambda head: weight.chunk(HEADS, dim=1)[head],
        )
        for layer in range(LAYERS)
    ]  # fmt: skip
    return CompressionState(PagedCache(keys, values), tables(layout, PAGE, 4), parts)


@pytest.mark.parametrize("policy", ["auto", "ada_snapkv", "expected_attention", "snapkv", "full"])
def test_no_request_is_left(policy: str) -> None:
    state = make_state(blocks=80)
    warm_up(state, CompressionConfig(policy=policy), 80)
    state.check()
    assert not state.rows(["adakv-warm-up"])
    rows = [state.tables.open([slab]) for slab in range(4)]
    assert sorted(rows) == [0, 1, 2, 3]


def test_too_few_blocks_are_left_alone() -> None:
    warm_up(make_state(blocks=8), CompressionConfig(), 8)
