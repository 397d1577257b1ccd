"""Numbers on their way from the host to a device."""

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

Integers: TypeAlias = "int | Sequence[Integers]"


def sent(numbers: Integers, device: torch.device) -> Tensor:
    """An int64 tensor of (nested) integers, on a device that is not waited for.

    From memory that may be paged out a GPU copies only once it has done all that it was told.
    """
    on_host = torch.tensor(numbers, dtype=torch.int64, pin_memory=device.type == "cuda")
    return on_host.to(device, non_blocking=True)
