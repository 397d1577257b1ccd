"""The tensor-parallel workers of an engine."""

from typing import NamedTuple

import torch
from torch import Tensor
from vllm.distributed.parallel_state import get_tp_group


class Ranks(NamedTuple):
    """One worker among `size`, each of which has KV heads of its own."""

    rank: int = 0
    size: int = 1
    group: torch.distributed.ProcessGroup | None = None

    @classmethod
    def of_this_engine(cls) -> "Ranks":
        group = get_tp_group()
        return cls(group.rank_in_group, group.world_size, group.cpu_group)

    def most(self, numbers: Tensor) -> Tensor:
        """Return each number's maximum over all ranks; all of them call this in the same step."""
        if self.size > 1:
            most = torch.distributed.ReduceOp.MAX
            torch.distributed.all_reduce(numbers, op=most, group=self.group)
        return numbers

    def each(self, numbers: Tensor) -> list[Tensor]:
        """Return every rank's numbers, which have one shape; all of them call this, as `most`."""
        if self.size == 1:
            return [numbers]
        each = [torch.empty_like(numbers) for _ in range(self.size)]
        torch.distributed.all_gather(each, numbers, group=self.group)
        return each
