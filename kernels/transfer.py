"""Transfer of integers from the host to a device."""

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

Integers: TypeAlias = "int | Sequence[Integers]"


def sent(numbers: Integers, device: torch.device) -> Tensor:
    """Return an int64 tensor of (nested) integers on a device, without waiting for it.

    Copies from pageable memory synchronize; pinned ones do not.
    """
    on_host = torch.tensor(numbers, dtype=torch.int64, pin_memory=device.type == "cuda")
    return on_host.to(device, non_blocking=True)
