"""One name for each operation: a readable reference, and faster paths by kind of device."""

import functools
from collections.abc import Callable
from typing import Generic, ParamSpec, TypeVar

from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


class Operation(Generic[P, R]):
    """A function that calls the path for the first argument's device, or else the reference.

    Every path returns what `reference` returns, up to rounding; tests compare the two.
    """

    def __init__(self, reference: Callable[P, R]) -> None:
        self.reference = reference
        self._paths: dict[str, Callable[P, R]] = {}
        functools.update_wrapper(self, reference)

    def on(self, device_type: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
        """Register a path for tensors on `device_type` (`cpu`, `cuda`)."""

        def register(path: Callable[P, R]) -> Callable[P, R]:
            self._paths[device_type] = path
            return path

        return register

    def path(self, device_type: str) -> Callable[P, R]:
        """Return what runs for tensors on a kind of device."""
        return self._paths.get(device_type, self.reference)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0]
        assert isinstance(first, Tensor)
        return self.path(first.device.type)(*args, **kwargs)
