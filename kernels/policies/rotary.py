"""Rotary position embedding, to move queries to other positions."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rotary:
    """Rotation of queries and keys (RoFormer, 2104.09864).

    inv_freq: [D_rot / 2] inverse frequencies, in radians per position.
    interleaved: whether pairs are (0, 1), (2, 3), ... as in GPT-J, or halves as in NeoX.
    """

    inv_freq: Tensor
    interleaved: bool = False

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Return x [..., s, D] rotated by `positions` [s]; negative positions rotate back."""
        angles = positions.to(self.inv_freq.dtype)[:, None] * self.inv_freq
        return self.apply(x, angles.cos(), angles.sin())

    def apply(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Return x [..., D] with each pair (a, b) as (a cos - b sin, b cos + a sin).

        Args:
            cos, sin: [..., D_rot / 2], one number for each pair.
        """
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
