"""Files in memory (a `tmpfs`) that stay mapped between uses."""

import mmap
import os
from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor

from adakv_worker.memory_files import check_room

# Twice the moves that can run at once.
_KEPT = 8


class MappedFiles:
    """Mapped files of one worker.

    Mapping a file takes longer than copying its content, so the last mappings stay. They also keep
    the memory of files that are removed meanwhile.
    """

    def __init__(self) -> None:
        self._mapped: OrderedDict[str, tuple[int, Tensor]] = OrderedDict()

    def read(self, path: Path) -> Tensor:
        """Return a file's bytes, uint8.

        Raises:
            OSError: the file does not exist.
            ValueError: the file is empty.
        """
        with path.open("r+b") as file:
            return self._memory(path, file.fileno())

    def write(self, path: Path, size: int) -> Tensor:
        """Make a file, or change its size; return its `size` bytes, uint8.

        Raises:
            OSError: there is no room for the file.
        """
        check_room(path, size)
        with path.open("r+b" if path.exists() else "w+b") as file:
            # Without this, lack of room would be a signal at the first write to a page.
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
