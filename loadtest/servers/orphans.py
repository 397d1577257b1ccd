"""Processes whose parents have died: this process adopts them, so that none escapes its looks."""

import ctypes


def adopt_orphans() -> None:
    """Become the parent of all descendants that lose theirs, in place of the first process.

    Raises:
        OSError: the kernel refuses.
    """
    PR_SET_CHILD_SUBREAPER = 36
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_CHILD_SUBREAPER, 1) != 0:
        raise OSError(ctypes.get_errno(), "this process cannot adopt orphans")
