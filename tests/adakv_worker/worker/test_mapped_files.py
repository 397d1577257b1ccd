"""Mapped files have the content that their path has now."""

import os
import uuid
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adakv_worker.memory_files import check_room
from adakv_worker.worker.mapped_files import MappedFiles


@settings(max_examples=50, deadline=None)
@given(
    uses=st.lists(
        st.tuples(st.sampled_from("abcdefghijkl"), st.integers(1, 20_000), st.booleans()),
        min_size=1,
        max_size=30,
    )
)
def test_reads_return_the_last_write(
    tmp_path_factory: pytest.TempPathFactory, uses: list[tuple[str, int, bool]]
) -> None:
    folder = tmp_path_factory.mktemp("mapped")
    writer, reader = MappedFiles(), MappedFiles()
    for number, (name, size, removed) in enumerate(uses):
        path = folder / name
        if removed:
            path.unlink(missing_ok=True)
        writer.write(path, size).fill_(number)
        assert path.stat().st_size == size
        content = reader.read(path)
        assert len(content) == size
        assert bool((content == number).all())


def test_missing_and_empty_files_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        MappedFiles().read(tmp_path / "nothing")
    (tmp_path / "empty").touch()
    with pytest.raises(ValueError, match="empty"):
        MappedFiles().read(tmp_path / "empty")


def test_a_file_that_would_leave_too_little_memory_is_refused_before_it_takes_any() -> None:
    memory = os.statvfs("/dev/shm")
    free, whole = (blocks * memory.f_frsize for blocks in (memory.f_bavail, memory.f_blocks))
    spare = min(whole // 10, 1 << 30)
    path = Path("/dev/shm") / f"adakv-test-{uuid.uuid4().hex}"
    check_room(path, free - 2 * spare)
    with pytest.raises(OSError, match="too little"):
        check_room(path, free - spare // 2)
    with pytest.raises(OSError, match="too little"):
        MappedFiles().write(path, 2 * whole)
    assert not path.exists()


def test_a_file_that_does_not_grow_needs_no_room(tmp_path: Path) -> None:
    path = tmp_path / "state"
    MappedFiles().write(path, 1 << 20)
    check_room(path, 1 << 20)
    check_room(path, 1 << 10)
