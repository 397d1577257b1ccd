"""What a command is, and what several of them need."""

import argparse
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from adakv_serve.evals.results.files import read_rows, write_rows
from adakv_serve.evals.results.report import report
from adakv_serve.evals.results.scores import Row
from adakv_serve.serving.models.embedded import EMBEDDED_MODEL_NAME


class Command(NamedTuple):
    """One command of `python -m evals`.

    add_options: adds the command's options to its parser.
    run: does the work and returns the exit status. It imports what is slow to import.
    is_long: whether the command takes long, so that it says on standard error that it runs.
    """

    name: str
    help: str
    add_options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    is_long: bool = True


def add_model_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="a folder or a hub id; without it the embedded model")


def add_kv_bytes_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--kv-bytes", type=int, help="without it enough for two whole contexts")


def add_out_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, help="a .jsonl file")


def model_name(args: argparse.Namespace) -> str:
    """Return the name under which results of `--model` are written."""
    name = Path(args.model).name if args.model else EMBEDDED_MODEL_NAME
    page_dtype = getattr(args, "page_dtype", "auto")
    if page_dtype != "auto":
        return f"{name}, {page_dtype} pages"
    rounding = getattr(args, "page_rounding", None)
    return name if rounding is None else f"{name}, simulated {rounding} pages"


def run_engine_in_process() -> None:
    """Set vLLM's environment so that the engine runs here and its logits can be read.

    Call it before the first import of vLLM.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")


def write(parts: Iterable[list[Row]], out: Path, earlier: Iterable[Row] = ()) -> int:
    """Write rows as they come, with a line of progress for each part, and print the report."""
    for done in write_rows(parts, out, earlier):
        full = done[0]
        shares = f"exact {full.exact}" if full.metric is None else f"score {full.metric}"
        print(f"{full.mode} {full.task}: n={full.n}, full cache {shares}", flush=True)
    print(report(read_rows(out)))
    return 0
