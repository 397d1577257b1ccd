"""Where the pages of a KV block lie in the engine's memory."""

from typing import NamedTuple

import torch
from torch import Tensor


class PageLayout(NamedTuple):
    """Places of the L * H pages of a block: page id = block * block_stride + offsets[i].

    offsets: [L, H] int64.
    """

    block_stride: int
    offsets: Tensor

    @classmethod
    def layers_outermost(cls, layers: int, heads: int, blocks: int) -> "PageLayout":
        """Return the layout with one region for each layer's blocks (vLLM's LBHNC)."""
        layer_starts = torch.arange(layers)[:, None] * (blocks * heads)
        return cls(heads, layer_starts + torch.arange(heads))

    @classmethod
    def blocks_outermost(cls, layers: int, heads: int) -> "PageLayout":
        """Return the layout with one region for each block's layers (vLLM's BLHNC)."""
        return cls(layers * heads, torch.arange(layers * heads).view(layers, heads))

    def to(self, device: torch.device) -> "PageLayout":
        return self._replace(offsets=self.offsets.to(device))

    @property
    def pages_per_block(self) -> int:
        return self.offsets.numel()

    def block_pages(self, blocks: Tensor, layer: int) -> Tensor:
        """Return page ids [nb, H] of uncompressed blocks [nb] in `layer`."""
        return blocks[:, None] * self.block_stride + self.offsets[layer]

    def blocks_pages(self, blocks: Tensor, layers: Tensor) -> Tensor:
        """Return page ids [K, nb, H] of uncompressed blocks [nb] in `layers` [K]."""
        return (blocks * self.block_stride)[:, None] + self.offsets[layers][:, None]

    def slab_pages(self, slabs: Tensor) -> Tensor:
        """Return page ids [num_slabs * L * H] of slabs [num_slabs] in the order of use."""
        return (slabs[:, None] * self.block_stride + self.offsets.view(-1)).view(-1)
