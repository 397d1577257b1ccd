"""Page tables on the device against those of the host."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adakv_serve.kernels.gpu.tables import grow_by_one, place_pages
from adakv_serve.kernels.paging.growth import grow_reference
from adakv_serve.kernels.paging.host_tables import HostTables
from adakv_serve.kernels.paging.layout import PageLayout

PAGE = 4


def on_device(layout: PageLayout, device: torch.device) -> PageLayout:
    return layout._replace(offsets=layout.offsets.to(device))


@pytest.mark.parametrize("width", [3, 100])
def test_pages_are_handed_out_as_on_the_host(width: int, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(width)
    layout = PageLayout.blocks_outermost(5, 3)
    lens = torch.randint(0, PAGE * 3 + 1, (5, 3), generator=generator, dtype=torch.int32)
    slabs = torch.randperm(40, generator=generator)[:6].tolist()
    tables = HostTables(layout, PAGE, rows=1)
    row = tables.open(slabs)
    on_gpu = torch.tensor(slabs, dtype=torch.int32, device=device)
    used = torch.zeros(1, dtype=torch.int32, device=device)
    # Some layers at a time, as they are scored.
    for layers in ([0, 1], [2], [3, 4]):
        expected = tables.place_layers(row, layers, lens[layers])
        got = place_pages(
            lens[layers].to(device), on_gpu, used, on_device(layout, device), PAGE, width
        ).cpu()
        owned = torch.arange(width) < -(-lens[layers] // PAGE)[..., None]
        assert torch.equal(got[owned], expected[..., :width][owned[..., : expected.shape[-1]]])
        assert bool((got[~owned] == -1).all())
        assert int(used) == tables.used_pages(row)


@settings(max_examples=30, deadline=None)
@given(
    layers=st.integers(1, 4),
    requests=st.integers(1, 3),
    heads=st.integers(1, 3),
    seed=st.integers(0, 10**6),
    steps=st.integers(1, 10),
)
def test_growth(
    device: torch.device, layers: int, requests: int, heads: int, seed: int, steps: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = (layers, requests, heads)
    layout = PageLayout.layers_outermost(layers, heads, 200)
    lens = torch.randint(0, 12, shape, generator=generator, dtype=torch.int32)
    width = 12 // PAGE + steps // PAGE + 2
    tables = torch.randint(0, 99, (*shape, width), generator=generator, dtype=torch.int32)
    used = torch.randint(0, 3, (requests,), generator=generator).tolist()
    slabs = torch.randperm(200, generator=generator)[: requests * 20].view(requests, 20).int()
    pages = [layout.slab_pages(row.long()).tolist() for row in slabs]
    ours = [t.clone().to(device) for t in (lens, tables, torch.tensor(used).int())]
    granted = torch.full((requests,), 20, dtype=torch.int32, device=device)
    for _ in range(steps):
        expected = grow_reference(
            lens, tables, used, PAGE, lambda request, ordinal: pages[request][ordinal]
        )
        slots = grow_by_one(
            *ours, slabs.to(device), granted, on_device(layout, device), PAGE
        )  # fmt: skip
        assert torch.equal(slots.cpu(), expected)
        assert torch.equal(ours[0].cpu(), lens)
        assert torch.equal(ours[1].cpu(), tables)
        assert ours[2].tolist() == used


def test_beyond_the_slabs_nothing_is_written(device: torch.device) -> None:
    layout = on_device(PageLayout.blocks_outermost(2, 2), device)
    lens = torch.full((2, 1, 2), PAGE, dtype=torch.int32, device=device)
    tables = torch.zeros((2, 1, 2, 3), dtype=torch.int32, device=device)
    used = torch.tensor([2], dtype=torch.int32, device=device)
    slabs = torch.tensor([[7, 9]], dtype=torch.int32, device=device)
    granted = torch.tensor([1], dtype=torch.int32, device=device)
    slots = grow_by_one(lens, tables, used, slabs, granted, layout, PAGE)
    assert slots.flatten().tolist() == [(7 * 4 + 2) * PAGE, (7 * 4 + 3) * PAGE, -1, -1]
    assert tables[..., 1].flatten().tolist() == [30, 31, 0, 0]
