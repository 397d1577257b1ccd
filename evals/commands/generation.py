"""`python -m evals generation`: measure long answers under evictions."""

import argparse

from adakv_serve.evals.commands.command import (
    Command,
    add_kv_bytes_option,
    add_model_option,
    add_out_option,
    model_name,
    run_engine_in_process,
    write,
)
from adakv_serve.evals.policies import EVICTING_POLICIES


def _add_options(parser: argparse.ArgumentParser) -> None:
    add_out_option(parser)
    add_model_option(parser)
    parser.add_argument("--policies", nargs="+", default=EVICTING_POLICIES)
    parser.add_argument("--budgets", nargs="+", type=int, default=(64, 128, 256))
    parser.add_argument("--answer-tokens", type=int, default=1000, help="at most")
    parser.add_argument("--samples", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    add_kv_bytes_option(parser)


def _run(args: argparse.Namespace) -> int:
    run_engine_in_process()
    import random

    from adakv_serve.evals.answering.engine import ForcedEngine
    from adakv_serve.evals.choice import Choice
    from adakv_serve.evals.generation import run_generation
    from adakv_serve.evals.tasks.source import Source
    from adakv_serve.serving.models.embedded import embedded_model_path

    context_tokens = args.answer_tokens + 1024
    engine = ForcedEngine(args.model or embedded_model_path(), context_tokens, args.kv_bytes)
    source = Source(engine.tokenizer, context_tokens, random.Random(args.seed))
    choices = [
        Choice(policy, tokens=budget, decode_tokens=budget)
        for policy in args.policies
        for budget in args.budgets
    ]
    parts = run_generation(
        engine, model_name(args), source, choices, args.samples, args.answer_tokens
    )
    return write(parts, args.out)


COMMAND = Command(
    "generation", "long answers, with evictions while they are written", _add_options, _run
)
