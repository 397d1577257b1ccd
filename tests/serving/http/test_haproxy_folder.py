"""Folders of HAProxy, which end with Serve's proxy, however that ends."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from adakv_serve.loadtest.servers.ports import free_port
from adakv_serve.serving.http.haproxy_folder import own, remove_left
from tests.serving.http.real_haproxy import (
    ROOT,
    get_haproxy_binary,
    serves_configuration,
    short_folder,
)
from tests.waiting import eventually

# Starts HAProxy for each line that it reads, as Serve's proxy does.
OWNER = """
import subprocess, sys
for line in sys.stdin:
    process = subprocess.Popen(sys.argv[1:])
    print(process.pid, flush=True)
    process.wait()
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    with short_folder() as folder:
        yield folder


@contextmanager
def owner_of(path: Path) -> Iterator["subprocess.Popen[str]"]:
    """Run a process that starts HAProxy with this configuration."""
    command = [sys.executable, "-c", OWNER, str(ROOT / "configs" / "haproxy"), "-db", "-f"]
    process = subprocess.Popen(
        [*command, str(path)],
        env={**os.environ, "ADAKV_HAPROXY": get_haproxy_binary()},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    with process:
        try:
            yield process
        finally:
            process.kill()


def started(owner: "subprocess.Popen[str]", socket: Path) -> psutil.Process:
    """Return the HAProxy that an owner starts, once its socket is there."""
    socket.unlink(missing_ok=True)
    assert owner.stdin is not None
    assert owner.stdout is not None
    owner.stdin.write("\n")
    owner.stdin.flush()
    process = psutil.Process(int(owner.stdout.readline()))
    eventually(socket.exists)
    return process


def test_the_folder_outlives_a_killed_haproxy_but_not_who_has_started_it(folder: Path) -> None:
    path, _ = serves_configuration(folder, free_port(), free_port())
    with owner_of(path) as owner:
        started(owner, path.parent / "admin.sock").kill()
        haproxy = started(owner, path.parent / "admin.sock")
        assert path.exists()
        owner.kill()
    eventually(lambda: not path.parent.exists())
    eventually(lambda: not haproxy.is_running())


def test_what_killed_clusters_have_left_goes_at_the_next_start(folder: Path) -> None:
    left, living, strange = folder / "left", folder / "living", folder / "strange"
    for one in (left, living, strange):
        one.mkdir()
        (one / "admin.sock").touch()
    with subprocess.Popen(["sleep", "600"]) as killed:
        own(left, killed.pid)
        killed.kill()
    own(living, os.getpid())
    # Its owner has ended, and another process has the number.
    (folder / "again").mkdir()
    (folder / "again" / "owner").write_text(f"{os.getpid()} 1")
    remove_left(folder)
    assert sorted(folder.iterdir()) == [living, strange]
