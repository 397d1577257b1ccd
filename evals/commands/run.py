"""`python -m evals run`: measure tasks under policies and budgets."""

import argparse
from contextlib import closing

from adakv_serve.evals.commands import asking
from adakv_serve.evals.commands.command import Command, model_name, run_engine_in_process, write
from adakv_serve.evals.samples import MODES


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--modes", nargs="+", choices=MODES, help="without it all that can be")
    parser.add_argument("--document-tokens", type=int, default=1024)
    parser.add_argument("--samples", type=int, default=24, help="of each task")
    parser.add_argument("--questions", type=int, help="of each document, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--resume", action="store_true", help="ask only what --out has no results of yet"
    )
    asking.add_options(parser)


def _run(args: argparse.Namespace) -> int:
    run_engine_in_process()
    from adakv_serve.evals.results.files import read_rows
    from adakv_serve.evals.run import Plan, run
    from adakv_serve.evals.tasks import TASKS

    if unknown := set(args.tasks or ()) - TASKS.keys():
        raise ValueError(
            f"unknown tasks {', '.join(sorted(unknown))}: known are {', '.join(TASKS)}"
        )
    asking.check(args.server, args.modes or (), args.page_dtype, args.page_rounding)
    plan = Plan(
        args.tasks or list(TASKS), args.modes or (MODES[:1] if args.server else MODES),
        args.policies, args.budgets, args.ratios, args.document_tokens, args.samples, args.seed,
        args.questions,
    )  # fmt: skip
    earlier = read_rows(args.out) if args.resume and args.out.exists() else []
    context = 2 * args.document_tokens + 1024
    with closing(asking.answering(args, context, or_the_models=True)) as answering:
        return write(run(answering, model_name(args), plan, earlier), args.out, earlier)


COMMAND = Command("run", "measure, and write a results file", _add_options, _run)
