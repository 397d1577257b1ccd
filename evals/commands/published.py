"""`python -m evals published`: measure LongBench or RULER."""

import argparse
from contextlib import closing
from pathlib import Path

from adakv_serve.evals.commands import asking
from adakv_serve.evals.commands.command import Command, model_name, run_engine_in_process, write
from adakv_serve.evals.samples import MODES


def _add_options(parser: argparse.ArgumentParser) -> None:
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--longbench", type=Path, help="with data/ and config/ as published")
    where.add_argument("--ruler", type=Path, help="with <task>/validation.jsonl")
    parser.add_argument("--mode", choices=MODES, default=MODES[0])
    parser.add_argument("--limit", type=int, help="of each task's questions")
    parser.add_argument("--context-tokens", type=int, default=8192)
    asking.add_options(parser)


def _run(args: argparse.Namespace) -> int:
    run_engine_in_process()
    from adakv_serve.evals.published.longbench import read_longbench
    from adakv_serve.evals.published.ruler import read_ruler
    from adakv_serve.evals.published.run import run_published
    from adakv_serve.evals.run import choices

    asking.check(args.server, [args.mode], args.page_dtype, args.page_rounding)
    # All of them: a malformed file is refused before anything is measured.
    if args.longbench:
        questions = list(read_longbench(args.longbench, args.tasks))
    else:
        questions = list(read_ruler(args.ruler, args.tasks))
    tried = choices(args.policies, args.budgets, args.ratios)
    with closing(asking.answering(args, args.context_tokens)) as answering:
        rows = run_published(
            answering, model_name(args), questions, tried, args.mode, args.context_tokens,
            args.limit,
        )  # fmt: skip
        return write(rows, args.out)


COMMAND = Command("published", "LongBench or RULER from a folder", _add_options, _run)
