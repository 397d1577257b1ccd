"""A file of API keys' digests, which is read again when it changes."""

import logging
import re
from pathlib import Path

_DIGEST = re.compile(r"[0-9a-f]{64}")


class KeyFile:
    """The SHA-256 digests in a file of lines `NAME DIGEST`; `#` begins a comment.

    While the file cannot be read, what it had counts on.

    names: the keys' names by their digests. A name may have several keys.
    """

    def __init__(self, path: Path, logger: logging.Logger) -> None:
        """
        Raises:
            OSError: the file cannot be read.
            ValueError: a line is not `NAME DIGEST`, or there is none.
        """
        self._path = path
        self._logger = logger
        self._version: tuple[int, int, int] | None = self._seen()
        self.names = _read(path)
        self._is_lost = False

    def refresh(self) -> None:
        """Read the file if it has changed."""
        try:
            if (version := self._seen()) != self._version:
                self._version = version
                self.names = _read(self._path)
                self._is_lost = False
                self._logger.info("%s: %d API keys", self._path, len(self.names))
        except ValueError as error:
            self._logger.error("the API keys stay as they were: %s", error)
        except OSError as error:
            # Once, until the file is there again.
            if not self._is_lost:
                self._logger.error("the API keys stay as they were: %s", error)
            self._is_lost, self._version = True, None

    def _seen(self) -> tuple[int, int, int]:
        status = self._path.stat()
        return status.st_ino, status.st_size, status.st_mtime_ns


def _read(path: Path) -> dict[bytes, str]:
    names: dict[bytes, str] = {}
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        if len(words) != 2 or not _DIGEST.fullmatch(words[1]):
            raise ValueError(f"{path}, line {number}: expected NAME and a SHA-256 digest in hex")
        names[bytes.fromhex(words[1])] = words[0]
    if not names:
        raise ValueError(f"{path} has no API key")
    return names
