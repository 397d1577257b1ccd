"""A full `/dev/shm`."""

import asyncio
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

from adakv_serve.loadtest.faults.scene import Scene

_FULL_S = 8.0
# Less than one moving cache.
_LEFT_BYTES = 256 << 10
# What stays to the machine beside a file that fills it.
_SPARE_BYTES = 3 << 30


@contextmanager
def filled(folder: Path, left_bytes: int = _LEFT_BYTES) -> Iterator[None]:
    """Fill the file system of a folder in memory for the duration of the block.

    The file that fills it has no name, so the kernel removes it whenever this process ends.

    Args:
        left_bytes: what stays free.

    Raises:
        MemoryError: the machine has too little memory for that.
    """
    handle = os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o600)
    try:
        system = os.fstatvfs(handle)
        size = system.f_bavail * system.f_frsize - left_bytes
        if size > psutil.virtual_memory().available - _SPARE_BYTES:
            raise MemoryError(f"{size >> 20} MiB are free in {folder}, but not in this machine")
        if size > 0:
            os.posix_fallocate(handle, 0, size)
        yield
    finally:
        os.close(handle)


async def fill_shared_memory(scene: Scene) -> Sequence[str]:
    """Fill the deployment's `/dev/shm` for a while.

    Returns:
        Why it was not done, if so.
    """
    try:
        with filled(scene.shared_memory):
            await asyncio.sleep(_FULL_S)
    except MemoryError as error:
        return [f"not done: {error}"]
    return ()
