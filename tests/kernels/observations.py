"""Random observations of all layers of a model."""

from functools import partial

import torch

from adakv_serve.kernels.policies.observation import Observation
from adakv_serve.kernels.policies.rotary import Rotary


def _weight(hidden: int, width: int, layer: int, heads: int, head: int) -> torch.Tensor:
    weight = torch.randn((hidden, width), generator=torch.Generator().manual_seed(layer))
    return weight.chunk(heads, dim=1)[head]


def observations(
    layers: int, heads: int, group: int, n: int, dim: int, seed: int
) -> list[Observation]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    rotary = Rotary(10000.0 ** -(torch.arange(0, dim, 2) / dim))
    return [
        Observation(
            normal(heads * group, min(n, 64), dim), normal(heads, n, dim), normal(heads, n, dim),
            dim**-0.5, rotary, partial(_weight, 24, heads * group * dim, layer, heads), layer,
        )
        for layer in range(layers)
    ]  # fmt: skip
