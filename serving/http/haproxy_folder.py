"""Removes the folder of a HAProxy when the cluster that has started it ends, however it does.

Ray Serve makes a folder for each node, and leaves it with its sockets. `configs/haproxy` runs this
file, without our packages, at each start of HAProxy. It removes what killed clusters have left,
and starts a process that waits for the end of Serve's proxy.
"""

import argparse
import contextlib
import os
import select
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

_OWNER = "owner"
# How often the process that waits looks whether there is still something to remove.
_LOOK_S = 60.0


def process_name(pid: int) -> str | None:
    """Return a name that no other process of this machine has had; None without such a process."""
    with contextlib.suppress(OSError):
        # The second field, its command, may have spaces and brackets. The 22nd is its start.
        born = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
        return f"{pid} {born}"
    return None


def own(folder: Path, pid: int) -> bool:
    """Note whose folder it is; return whether that is new."""
    name = process_name(pid)
    if name is None or _owner(folder) == name:
        return False
    new = folder / f"{_OWNER}.new"
    new.write_text(name)
    new.replace(folder / _OWNER)
    return True


def remove_left(base: Path) -> None:
    """Remove the folders in this one whose owners have ended."""
    for folder in list(_owned(base)):
        owner = _owner(folder)
        if owner is not None and process_name(int(owner.split()[0])) != owner:
            shutil.rmtree(folder, ignore_errors=True)


def wait_and_remove(folder: Path, pid: int) -> None:
    """Return at the end of a process, and have removed its folder."""
    owner = _owner(folder)
    with contextlib.suppress(ProcessLookupError):
        handle = os.pidfd_open(pid)
        while process_name(pid) == owner and not select.select([handle], [], [], _LOOK_S)[0]:
            if not folder.exists():
                return
    # It may have another owner by now.
    if owner is not None and _owner(folder) == owner:
        shutil.rmtree(folder, ignore_errors=True)


def _owned(base: Path) -> Iterator[Path]:
    for file in base.glob(f"*/{_OWNER}"):
        if not file.parent.is_symlink():
            yield file.parent


def _owner(folder: Path) -> str | None:
    with contextlib.suppress(OSError):
        return (folder / _OWNER).read_text()
    return None


def main(argv: list[str] | None = None) -> int:
    """Take the options of HAProxy, of which `-f` names a file in the folder."""
    parser = argparse.ArgumentParser(description=__doc__, add_help=False)
    parser.add_argument("--owner", type=int, required=True, help="pid of Serve's proxy")
    parser.add_argument("--wait", action="store_true")
    parser.add_argument("-f", dest="config", type=Path, required=True)
    args = parser.parse_known_args(argv)[0]
    folder: Path = args.config.parent
    if args.wait:
        wait_and_remove(folder, args.owner)
        return 0
    remove_left(folder.parent)
    if own(folder, args.owner):
        # Its own session: what ends HAProxy's process group must not end it.
        waiting = ["--wait", "--owner", str(args.owner), "-f", str(args.config)]
        subprocess.Popen(
            [sys.executable, "-I", __file__, *waiting],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
