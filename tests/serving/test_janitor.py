"""A killed replica leaves no process and no file, and a living one loses none."""

import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from adakv_serve.serving.janitor import Estate, clear
from adakv_serve.serving.spill.parcels import StateFiles
from tests.waiting import eventually

# Has a stopped child, a mapped file and spill files, as a replica has an engine that hangs.
REPLICA = """
import mmap, subprocess, sys
from pathlib import Path
import psutil
from adakv_serve.serving.janitor import Estate, Janitor
from adakv_serve.serving.spill.parcels import StateFiles

shared, folder = sys.argv[1:]
with open(shared, "w+b") as file:
    file.truncate(4096)
    memory = mmap.mmap(file.fileno(), 4096)
child = subprocess.Popen(["sleep", "600"])
janitor = Janitor(Estate.of(psutil.Process(), folder))
with StateFiles(Path(folder)).path() as path:
    Path(f"{path}.0").write_bytes(b"state")
    print(child.pid, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def shared() -> Iterator[Path]:
    path = Path(f"/dev/shm/vllm_{uuid.uuid4().hex}")
    yield path
    path.unlink(missing_ok=True)


def test_a_killed_replica_leaves_neither_processes_nor_files(shared: Path, tmp_path: Path) -> None:
    mine = StateFiles(tmp_path)
    with mine.path() as path:
        replica = subprocess.Popen(
            [sys.executable, "-c", REPLICA, str(shared), str(tmp_path)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert replica.stdout is not None
        engine = psutil.Process(int(replica.stdout.readline()))
        engine.send_signal(signal.SIGSTOP)
        assert shared.exists()
        assert len(list(tmp_path.iterdir())) == 2
        replica.kill()
        replica.wait()
        eventually(lambda: not engine.is_running())
        eventually(lambda: not shared.exists())
        # Those of a replica that lives.
        eventually(lambda: list(tmp_path.iterdir()) == [path.parent])
    mine.clear()


def test_a_process_that_has_got_the_number_of_a_dead_one_lives(tmp_path: Path) -> None:
    child = subprocess.Popen(["sleep", "600"])
    try:
        # The test's own process may have others, such as the one of `multiprocessing`.
        known = dict(Estate.of(psutil.Process(), str(tmp_path)).processes)
        process = child.pid, known[child.pid]
        clear(Estate([(child.pid, process[1] - 1)], [], str(tmp_path)))
        assert child.poll() is None
        clear(Estate([process], [], str(tmp_path)))
        assert not psutil.pid_exists(child.pid)
    finally:
        child.kill()


def test_a_file_that_is_gone_already_does_not_matter(shared: Path, tmp_path: Path) -> None:
    shared.touch()
    clear(Estate([], [f"{shared}-gone", str(shared)], str(tmp_path)))
    assert not os.path.exists(shared)
