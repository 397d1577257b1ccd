"""Serve's log of a replica, beside libraries that configure logging."""

import logging
import logging.config
from collections.abc import Iterator
from logging.handlers import MemoryHandler
from pathlib import Path

import pytest

from adakv_serve.serving.kept_logs import kept_logs


@pytest.fixture
def file(tmp_path: Path) -> Iterator[Path]:
    """Have Serve's logger write to a file through a buffer, as in a replica."""
    path, logger = tmp_path / "replica.log", logging.getLogger("ray.serve")
    buffer = MemoryHandler(1, target=logging.FileHandler(path))
    logger.addHandler(buffer)
    yield path
    logger.removeHandler(buffer)


def test_records_reach_the_file_after_a_library_has_configured_logging(file: Path) -> None:
    logger = logging.getLogger("ray.serve")
    with kept_logs():
        logging.config.dictConfig({"version": 1, "disable_existing_loggers": False})
    logger.warning("still here")
    assert "still here" in file.read_text()
    # The controller asks for the name.
    (buffer,) = (one for one in logger.handlers if isinstance(one, MemoryHandler))
    assert isinstance(buffer.target, logging.FileHandler)
    assert buffer.target.baseFilename == str(file)
