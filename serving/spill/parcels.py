"""Caches between two replicas: files in memory, and arrays that travel to another node."""

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

from adakv_serve.router.lending.leases import Lease
from adakv_serve.serving.janitor import SPILL_PREFIX
from adakv_worker.memory_files import check_room

if TYPE_CHECKING:
    from adakv_worker.frontend.moving import Departure


class Guest(NamedTuple):
    """A request that a borrower sends to its lender.

    path: path of its cache's files in memory of the lender's node, until its first output.
    lease: lease of the lender's memory.
    """

    departure: "Departure"
    path: str
    lease: Lease

    @property
    def nbytes(self) -> int:
        """Return the size of its cache, on the node of its files."""
        return sum(file.stat().st_size for file in _files(Path(self.path)))


class LenderName(NamedTuple):
    """Name of a replica in the ledger of lent memory, by which borrowers find it."""

    deployment: str
    replica_id: str
    node_id: str

    def __str__(self) -> str:
        return "/".join(self)

    @classmethod
    def of(cls, name: str) -> "LenderName":
        return cls(*name.split("/"))

    @classmethod
    def parse(cls, name: str) -> "LenderName | None":
        """Return the name of a replica; None for another text in the ledger."""
        return cls.of(name) if name.count("/") == 2 else None


# Their files keep the memory of the largest caches that they held.
_MOST_IDLE = 4


class StateFiles:
    """Paths for caches' files, each in a folder that only this user can read.

    Paths are reused after success: overwriting a file is several times as fast as allocating its
    memory. A few are kept for that, however many were in use at once. Each folder is locked as long
    as its process lives, also against other containers.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._idle: list[Path] = []
        self._locks: dict[Path, int] = {}

    @contextlib.contextmanager
    def path(self) -> Iterator[Path]:
        """Yield a path. After an exception its files may still be in use, so they are removed."""
        path = self._idle.pop() if self._idle else self._new()
        try:
            yield path
        except BaseException:
            self._remove(path)
            raise
        if len(self._idle) < _MOST_IDLE:
            self._idle.append(path)
        else:
            self._remove(path)

    def clear(self) -> None:
        """Remove the files that are not in use."""
        while self._idle:
            self._remove(self._idle.pop())

    def _new(self) -> Path:
        path = Path(tempfile.mkdtemp(prefix=SPILL_PREFIX, dir=self._folder)) / "state"
        self._locks[path] = lock = os.open(path.parent, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)
        return path

    def _remove(self, path: Path) -> None:
        shutil.rmtree(path.parent, ignore_errors=True)
        os.close(self._locks.pop(path))


def open_parcels(path: Path) -> list[np.ndarray]:
    """Map the files of all ranks without a copy. They may be removed while mapped."""
    # Plain arrays, because pickling a subclass copies.
    return [np.asarray(np.memmap(file, dtype=np.uint8, mode="r")) for file in _files(path)]


def place_parcels(parcels: Sequence[np.ndarray], path: Path) -> None:
    """Write the arrays of all ranks to files. Raise OSError if there is no room."""
    for rank, parcel in enumerate(parcels):
        file = _rank_file(path, rank)
        check_room(file, parcel.nbytes)
        with file.open("r+b" if file.exists() else "wb") as out:
            out.write(parcel.data)
            out.truncate()


def _files(path: Path) -> list[Path]:
    ranks = (_rank_file(path, rank) for rank in itertools.count())
    return list(itertools.takewhile(Path.exists, ranks))


def _rank_file(path: Path, rank: int) -> Path:
    # The workers' names.
    return Path(f"{path}.{rank}")
