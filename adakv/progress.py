"""Tells whoever waits what a program waits for, on standard error.

A terminal shows a line with the time so far, and a bar where the end is known. Elsewhere, as in
logs, lines come at the begin, at the end and once a minute.
"""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

_EVERY_S = 60.0

# Takes how much of the total is done, and what else there is to say.
Tell = Callable[[float, str], None]


@contextmanager
def waiting(what: str, total: float | None = None) -> Iterator[Tell]:
    """Say for the duration of the block that a program waits.

    Args:
        total: how much is done at the end, in any unit; None if that is not known.
    """
    began = time.monotonic()
    shown = _on_terminal if sys.stderr.isatty() else _in_lines
    with shown(what, total) as tell:
        yield tell
    print(f"{what}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)


@contextmanager
def _on_terminal(what: str, total: float | None) -> Iterator[Tell]:
    bar = [] if total is None else [BarColumn()]
    columns = (SpinnerColumn(), TextColumn(what, markup=False), *bar, TimeElapsedColumn())
    said = TextColumn("{task.fields[said]}", markup=False)
    # What a program prints goes where it is sent, not to the terminal.
    above = sys.stdout.isatty()
    console = Console(stderr=True)
    with Progress(
        *columns, said, console=console, transient=True, redirect_stdout=above
    ) as progress:
        task = progress.add_task(what, total=total, said="")
        yield lambda done, said: progress.update(task, completed=done, said=said)


@contextmanager
def _in_lines(what: str, total: float | None) -> Iterator[Tell]:
    last, ended = [""], threading.Event()

    def say_each_minute() -> None:
        while not ended.wait(_EVERY_S):
            print(f"{what} ...{last[0]}", file=sys.stderr, flush=True)

    def tell(done: float, said: str) -> None:
        share = "" if total is None else f" {100 * done / total:.0f} %"
        last[0] = f"{share} {said}".rstrip()

    print(f"{what} ...", file=sys.stderr, flush=True)
    # A daemon: it must not hold up a program that fails.
    speaker = threading.Thread(target=say_each_minute, daemon=True)
    speaker.start()
    try:
        yield tell
    finally:
        ended.set()
        speaker.join()
