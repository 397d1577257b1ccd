"""Folders that are derived once for each user, and kept."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def cache_root() -> Path:
    """Folder for what is derived once per user: `$ADAKV_CACHE`, else in `$XDG_CACHE_HOME`."""
    if root := os.environ.get("ADAKV_CACHE"):
        return Path(root)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "adakv-serve"


def made_once(target: Path, make: Callable[[Path], None]) -> Path:
    """Returns the folder `target`; if it is not there, `make` fills it first.

    Safe against concurrent callers (one makes it, the others wait) and against being killed: the
    folder appears by one rename, and what a killed one left behind is removed by the next.
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
