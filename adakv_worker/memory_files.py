"""Room for files in memory (a `tmpfs`), which others use as well."""

import errno
import os
from pathlib import Path

# Share of the folder's memory that stays free, and the most of it. Ray's object store and vLLM's
# workers take memory there when they first touch it, and where there is none the kernel kills them.
_SPARE_SHARE = 0.1
_MOST_SPARE_BYTES = 1 << 30


def check_room(file: Path, size: int) -> None:
    """Check that a file may be as large as `size` bytes.

    Raises:
        OSError: too little memory would be left to others.
    """
    more = size - _allocated_bytes(file)
    about = os.statvfs(file.parent)
    free, whole = about.f_bavail * about.f_frsize, about.f_blocks * about.f_frsize
    if more > 0 and free - more < min(_SPARE_SHARE * whole, _MOST_SPARE_BYTES):
        problem = f"of {free} free bytes, {size} for a cache would leave too little to others"
        raise OSError(errno.ENOSPC, problem, str(file))


def _allocated_bytes(file: Path) -> int:
    try:
        return file.stat().st_blocks * 512
    except FileNotFoundError:
        return 0
