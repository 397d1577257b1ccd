"""Rotary position embedding as plain tensor operations, to move queries in position."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rotary:
    """How a model rotates queries and keys (RoFormer, 2104.09864).

    inv_freq: [D_rot / 2] inverse frequencies, radians per position.
    interleaved: pairs are (0, 1), (2, 3), ... instead of halves (GPT-J instead of NeoX style).
    """

    inv_freq: Tensor
    interleaved: bool = False

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Turns x [..., s, D] to `positions` [s]; negative positions turn back."""
        angles = positions.to(self.inv_freq.dtype)[:, None] * self.inv_freq
        return self.apply(x, angles.cos(), angles.sin())

    def apply(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Applies the map that has `cos`, `sin` [..., D_rot / 2] in each pair's plane."""
        width = 2 * self.inv_freq.shape[0]
        turned, rest = x[..., :width], x[..., width:]
        if self.interleaved:
            first, second = turned[..., 0::2], turned[..., 1::2]
        else:
            first, second = turned.chunk(2, dim=-1)
        pair = (first * cos - second * sin, second * cos + first * sin)
        if self.interleaved:
            turned = torch.stack(pair, dim=-1).flatten(-2)
        else:
            turned = torch.cat(pair, dim=-1)
        return torch.cat((turned, rest), dim=-1)
