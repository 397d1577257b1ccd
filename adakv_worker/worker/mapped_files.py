"""Files in memory (a `tmpfs`), kept mapped from one use to the next."""

import mmap
import os
from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor

# As many moves as there may be at once, and again.
_KEPT = 8


class MappedFiles:
    """Of one worker. To map a file anew takes longer than to copy what is in it, so mappings stay:
    those that were used last, and with them the memory of files that are removed meanwhile."""

    def __init__(self) -> None:
        self._mapped: OrderedDict[str, tuple[int, Tensor]] = OrderedDict()

    def read(self, path: Path) -> Tensor:
        """A file's bytes, uint8.

        Raises:
            OSError: it is not there.
            ValueError: it is empty.
        """
        with path.open("r+b") as file:
            return self._memory(path, file.fileno())

    def write(self, path: Path, size: int) -> Tensor:
        """The `size` bytes, uint8, of a file that is made or has its size changed.

        Raises:
            OSError: there is no room for it.
        """
        with path.open("r+b" if path.exists() else "w+b") as file:
            # Else the lack of room would show as a signal, at the first write to a page.
            os.posix_fallocate(file.fileno(), 0, size)
            file.truncate(size)
            return self._memory(path, file.fileno())

    def _memory(self, path: Path, descriptor: int) -> Tensor:
        about = os.fstat(descriptor)
        inode, content = self._mapped.pop(str(path), (None, None))
        if content is None or inode != about.st_ino or len(content) < about.st_size:
            memory = mmap.mmap(descriptor, about.st_size)
            content = torch.frombuffer(memory, dtype=torch.uint8)
        self._mapped[str(path)] = about.st_ino, content
        while len(self._mapped) > _KEPT:
            self._mapped.popitem(last=False)
        return content[: about.st_size]
