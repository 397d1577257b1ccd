"""Numbers on their way from the host to a device."""

from typing import Any

import torch
from torch import Tensor


def sent(numbers: Any, device: torch.device) -> Tensor:
    """An int64 tensor of (nested) integers, on a device that is not waited for.

    From memory that may be paged out a GPU copies only once it has done all that it was told.
    """
    on_host = torch.tensor(numbers, dtype=torch.int64, pin_memory=device.type == "cuda")
    return on_host.to(device, non_blocking=True)
