"""Policies on caches of eight bits select as on the numbers that those store."""

import pytest
import torch

from adakv_serve.kernels.paging.entries import read
from adakv_serve.kernels.policies.presets import PRESETS, preset
from adakv_serve.kernels.policies.reselection import score_heads, score_ragged
from tests.kernels.observations import observations
from tests.kernels.paging import WITH_SCALES, in_bytes, with_scales

HEADS, N = 3, 150
SCALES = torch.tensor([0.5, 1.0, 3.0])


@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_selects_as_from_the_stored_numbers(name: str, stored: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(9)
    policy = preset(name)
    quantized, plain = [], []
    for layer in observations(2, HEADS, 2, N, 32, seed=7):
        keys, read_keys = in_bytes(layer.keys, stored, SCALES, 16, generator, by_dimension=True)
        values, read_values = in_bytes(layer.values, stored, SCALES, 16, generator)
        quantized.append(layer._replace(keys=keys, values=values))
        plain.append(layer._replace(keys=read_keys, values=read_values))
    selected, expected = policy.select(quantized, 60).kept, policy.select(plain, 60).kept
    # Sums in another order may part equal scores.
    assert int((selected ^ expected).sum()) <= 2


@pytest.mark.parametrize("form", WITH_SCALES)
@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_selects_alike_where_entries_have_scales(name: str, form: str) -> None:
    generator = torch.Generator().manual_seed(9)
    policy = preset(name)
    quantized, plain = [], []
    for layer in observations(2, HEADS, 2, N, 32, seed=7):
        keys, read_keys = with_scales(layer.keys, form, 16, generator)
        values, read_values = with_scales(layer.values, form, 16, generator)
        assert keys.shape == layer.keys.shape
        quantized.append(layer._replace(keys=keys, values=values))
        plain.append(layer._replace(keys=read_keys, values=read_values))
    selected, expected = policy.select(quantized, 60).kept, policy.select(plain, 60).kept
    assert int((selected ^ expected).sum()) <= 2


@pytest.mark.parametrize(("form", "most"), [("int8", 0.01), ("fp8", 0.04), ("int4", 0.15)])
def test_what_is_read_is_what_was_stored(form: str, most: float) -> None:
    generator = torch.Generator().manual_seed(4)
    entries = torch.randn((HEADS, N, 32), generator=generator)
    paged, numbers = with_scales(entries, form, 16, generator)
    off = (numbers - entries).norm(dim=-1) / entries.norm(dim=-1)
    assert 0 < float(off.max()) < most
    one = read(paged.head(1, 90))
    torch.testing.assert_close(one, numbers[1:2, :90])


def test_heads_of_different_lengths_have_the_scores_of_each_alone() -> None:
    generator = torch.Generator().manual_seed(3)
    policy = preset("ada_snapkv")
    (layer,) = observations(1, HEADS, 2, N, 32, seed=8)
    keys, _ = in_bytes(layer.keys, torch.float8_e4m3fn, SCALES, 16, generator)
    values, _ = in_bytes(layer.values, torch.float8_e4m3fn, SCALES, 16, generator)
    lens = [N, 90, 120]
    ragged = torch.tensor(lens, dtype=torch.int32)
    together = score_ragged(
        policy, layer._replace(keys=keys._replace(lens=ragged), values=values), ragged
    )
    alone = score_heads(
        policy,
        [
            layer._replace(
                queries=layer.queries[2 * head : 2 * head + 2],
                keys=keys.head(head, entries),
                values=values.head(head, entries),
            )
            for head, entries in enumerate(lens)
        ],
    )
    torch.testing.assert_close(together.scores, alone.scores)
