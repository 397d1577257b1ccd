"""A cache between two replicas: from files in memory to arrays that travel, and to files again."""

import contextlib
import fcntl
import itertools
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from router.lending.leases import Lease

if TYPE_CHECKING:
    from adakv_worker.frontend.moving import Departure

_PREFIX = "adakv-spill-"


class Guest(NamedTuple):
    """What a borrower sends.

    path: of its cache's files in the memory of the lender's node, which last until its first output
        has come.
    lease: of the lender's blocks, where it shall go on.
    """

    departure: "Departure"
    path: str
    lease: Lease

    @property
    def nbytes(self) -> int:
        """Of its cache, where its files are."""
        return sum(file.stat().st_size for file in _files(Path(self.path)))


class LenderName(NamedTuple):
    """What a replica is called in the ledger of lent memory, so that borrowers find it."""

    deployment: str
    replica_id: str
    node_id: str

    def __str__(self) -> str:
        return "/".join(self)

    @classmethod
    def of(cls, name: str) -> "LenderName":
        return cls(*name.split("/"))


class StateFiles:
    """Names for caches' files, in a folder that nobody else can read.

    Files whose use has ended well are written over by the next ones: to allocate memory takes
    several times as long as to copy to it. Each folder is locked for as long as its process lives,
    which replicas in other containers see, too.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._idle: list[Path] = []
        self._locks: dict[Path, int] = {}

    @contextlib.contextmanager
    def path(self) -> Iterator[Path]:
        """One name. If the block fails, somebody may be reading still: its files are removed."""
        path = self._idle.pop() if self._idle else self._new()
        try:
            yield path
        except BaseException:
            self._remove(path)
            raise
        self._idle.append(path)

    def clear(self) -> None:
        """Removes what is in no use."""
        while self._idle:
            self._remove(self._idle.pop())

    def _new(self) -> Path:
        path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=self._folder)) / "state"
        self._locks[path] = lock = os.open(path.parent, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)
        return path

    def _remove(self, path: Path) -> None:
        shutil.rmtree(path.parent, ignore_errors=True)
        os.close(self._locks.pop(path))


def remove_orphans(folder: Path) -> None:
    """Removes what replicas have left that were killed."""
    for left in folder.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            lock = os.open(left, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left, ignore_errors=True)
            finally:
                os.close(lock)


def open_parcels(path: Path) -> list[np.ndarray]:
    """Maps the files of all ranks: nothing is copied, and they may be removed while mapped."""
    # As plain arrays: a subclass is not pickled without a copy.
    return [np.asarray(np.memmap(file, dtype=np.uint8, mode="r")) for file in _files(path)]


def place_parcels(parcels: Sequence[np.ndarray], path: Path) -> None:
    """Raises OSError: there is no room for them."""
    for rank, parcel in enumerate(parcels):
        file = _rank_file(path, rank)
        with file.open("r+b" if file.exists() else "wb") as out:
            out.write(parcel.data)
            out.truncate()


def _files(path: Path) -> list[Path]:
    ranks = (_rank_file(path, rank) for rank in itertools.count())
    return list(itertools.takewhile(Path.exists, ranks))


def _rank_file(path: Path, rank: int) -> Path:
    # As workers name them.
    return Path(f"{path}.{rank}")
