"""The commands of `python -m evals`, one a file."""

from adakv_serve.evals.commands import (
    bits,
    crosscheck,
    fetch,
    gate,
    generation,
    published,
    report,
    run,
    theory,
    turns,
)
from adakv_serve.evals.commands.command import Command

COMMANDS: tuple[Command, ...] = (
    run.COMMAND,
    published.COMMAND,
    generation.COMMAND,
    report.COMMAND,
    bits.COMMAND,
    fetch.COMMAND,
    theory.COMMAND,
    turns.COMMAND,
    crosscheck.COMMAND,
    gate.COMMAND,
)
