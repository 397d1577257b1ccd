"""Keeps Ray Serve's log of a replica whole while something else configures logging."""

import contextlib
import logging
from collections.abc import Iterator
from logging.handlers import MemoryHandler

# Serve's own logger, whose records go to a file through a buffer.
_SERVE = "ray.serve"


@contextlib.contextmanager
def kept_logs() -> Iterator[None]:
    """Give the buffers of Serve's log their files back at the end.

    `logging.config`, which vLLM calls when it is imported, closes all handlers that there are. A
    buffer without a file loses the replica's records; and Serve's controller, once it has begun
    anew, asks replicas for the name of that file, and stops those that fail to answer.
    """
    handlers = logging.getLogger(_SERVE).handlers
    targets = [(one, one.target) for one in handlers if isinstance(one, MemoryHandler)]
    try:
        yield
    finally:
        for buffer, target in targets:
            buffer.setTarget(target)
