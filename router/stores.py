"""URLs of stores: their form, and the password of this machine's embedded store.

That password is random. Who starts the store keeps its URL in a file that only the same user can
read, for commands on the same machine.
"""

import contextlib
import fcntl
import os
import stat
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

from adakv_serve.router.ledger.store_client import StoreAddress

_REDIS_PORT = 6379
_LOOPBACK = ("127.0.0.1", "localhost")


def checked_url(url: str, name: str) -> str:
    """Return a store's URL if it can be read.

    Args:
        name: of the setting or variable that holds it, for the error.

    Raises:
        ValueError: it cannot; the message holds nothing of the URL, which may have a password.
    """
    problem = _problem(url)
    if problem is not None:
        # Not inside an `except`: the error below would be kept as its context.
        raise ValueError(f"{name} {problem}")
    return url


def _problem(url: str) -> str | None:
    try:
        address = StoreAddress.parse(url)
    except ValueError as error:
        return str(error)
    is_somewhere = address.sentinels or "host" in address.options
    return None if is_somewhere else "names no host"


def has_password(url: str) -> bool:
    """Return whether a URL, which `checked_url` has returned, carries a password."""
    address = StoreAddress.parse(url)
    return bool(address.options.get("password") or address.sentinel_options.get("password"))


def private_folder() -> Path:
    """Return this user's folder for sockets and URLs, which no other user can enter.

    Raises:
        PermissionError: another user has made a folder of its name.
    """
    folder = Path(f"/tmp/adakv-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to another user: remove it")
    if stat.S_IMODE(status.st_mode) != 0o700:
        folder.chmod(0o700)
    return folder


def keep_url(url: str) -> IO[str]:
    """Write the URL of an embedded store where `full_url` finds it.

    It counts while the returned file is open, so that none outlives its store.
    """
    folder = private_folder()
    _remove_left(folder)
    path = _file(folder, url)
    new = path.with_suffix(f".{os.getpid()}")
    file = os.fdopen(os.open(new, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600), "w")
    fcntl.flock(file, fcntl.LOCK_EX)
    file.write(url)
    file.flush()
    new.rename(path)
    return file


def full_url(url: str) -> str:
    """Return a URL with the password if it names an embedded store of this machine without one."""
    parts = urlsplit(url)
    if parts.scheme != "redis" or parts.hostname not in _LOOPBACK or has_password(url):
        return url
    return _kept(_file(private_folder(), url)) or url


def _remove_left(folder: Path) -> None:
    """Remove the files of stores that have ended."""
    for path in folder.glob("store-*.url"):
        if _kept(path) is None:
            path.unlink(missing_ok=True)


def _kept(path: Path) -> str | None:
    """Return what a file holds, if who wrote it keeps it open."""
    with contextlib.suppress(OSError), path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return file.read()
    return None


def _file(folder: Path, url: str) -> Path:
    return folder / f"store-{urlsplit(url).port or _REDIS_PORT}.url"
