"""Folders that are made once for each user, and kept."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def cache_root() -> Path:
    """Return the folder for derived files: `$ADAKV_CACHE`, else one in `$XDG_CACHE_HOME`."""
    if root := os.environ.get("ADAKV_CACHE"):
        return Path(root)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "adakv-serve"


def made_once(target: Path, make: Callable[[Path], None]) -> Path:
    """Return the folder `target`; call `make` to fill it first if it is missing.

    Concurrent callers are safe: one makes the folder, the others wait. So is a kill: the folder
    appears by one rename, and the next caller removes the remains of a killed one.
    """
    if target.is_dir():
        return target
    root = target.parent
    root.mkdir(parents=True, exist_ok=True)
    with _exclusive(root / f"{target.name}.lock"):
        if target.is_dir():
            return target
        for leftover in root.glob(f"{target.name}.tmp-*"):
            shutil.rmtree(leftover)
        partial = Path(tempfile.mkdtemp(prefix=f"{target.name}.tmp-", dir=root))
        make(partial)
        partial.rename(target)
    return target


@contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
