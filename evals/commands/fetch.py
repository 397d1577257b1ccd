"""`python -m evals fetch`: fetch a model that is large enough to measure published sets with."""

import argparse
import sys

from adakv_serve.evals.commands.command import Command


def _add_options(parser: argparse.ArgumentParser) -> None:
    pass


def _run(args: argparse.Namespace) -> int:
    from adakv_serve.evals.coder_model import fetch_coder_model

    print(fetch_coder_model(lambda text: print(text, file=sys.stderr, flush=True)))
    return 0


COMMAND = Command(
    "fetch",
    "fetch Qwen2.5-Coder-1.5B-Instruct (1.1 GB), and print where it is",
    _add_options,
    _run,
    is_long=False,
)
