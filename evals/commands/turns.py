"""`python -m evals turns`: measure conversations whose later turns resume a compressed cache."""

import argparse
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from adakv_serve.evals.commands.command import (
    Command,
    add_kv_bytes_option,
    add_model_option,
    add_out_option,
    model_name,
    run_engine_in_process,
    write,
)

if TYPE_CHECKING:
    from adakv_serve.evals.results.scores import Row


def _at_least_one(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("at least one")
    return number


def _add_options(parser: argparse.ArgumentParser) -> None:
    add_out_option(parser)
    add_model_option(parser)
    parser.add_argument("--tasks", nargs="+", help="without it all that ask several questions")
    parser.add_argument("--policies", nargs="+", default=("auto",))
    parser.add_argument("--ratios", nargs="+", type=float, default=(0.5, 0.25))
    parser.add_argument("--document-tokens", type=int, default=1024)
    parser.add_argument("--conversations", type=int, default=12, help="of each task")
    parser.add_argument("--turns", type=_at_least_one, default=6)
    parser.add_argument("--seed", type=int, default=0)
    add_kv_bytes_option(parser)


def _run(args: argparse.Namespace) -> int:
    run_engine_in_process()
    from adakv_serve.evals.turns import TASKS

    if unknown := set(args.tasks or ()) - set(TASKS):
        raise ValueError(f"no conversations of {', '.join(sorted(unknown))}: of {', '.join(TASKS)}")
    return write(_both(args, args.tasks or TASKS), args.out)


def _both(args: argparse.Namespace, tasks: Sequence[str]) -> Iterator[list["Row"]]:
    """Yield the rows of an engine that compresses the newest turn, then of one that takes all."""
    from adakv_serve.evals.answering.engine import ForcedEngine
    from adakv_serve.evals.choice import FULL, Choice, Session
    from adakv_serve.evals.turns import run_turns
    from adakv_serve.serving.models.embedded import embedded_model_path

    done: list[Row] = []
    engines: list[tuple[str, tuple[Session, ...]]] = [
        ("newest", ("off", "newest")),
        ("all", ("all",)),
    ]
    for compress, sessions in engines:
        engine = ForcedEngine(
            args.model or embedded_model_path(), 2 * args.document_tokens + 1024, args.kv_bytes,
            sessions={"enabled": True, "compress": compress, "min_saved_tokens": 1},
        )  # fmt: skip
        choices = [
            Choice(policy, ratio=ratio, session=session)
            for policy in args.policies
            for ratio in args.ratios
            for session in sessions
        ]
        rows: list[Row] = []
        for rows in run_turns(
            engine, model_name(args), tasks, choices, args.document_tokens, args.conversations,
            args.turns, args.seed,
        ):  # fmt: skip
            yield [*done, *rows]
        done += [one for one in rows if not done or one.policy != FULL]
        engine.close()


COMMAND = Command("turns", "conversations that go on from a compressed cache", _add_options, _run)
