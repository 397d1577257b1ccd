"""`python -m evals crosscheck`: compare our selections with kvpress'."""

import argparse
from pathlib import Path

from adakv_serve.evals.commands.command import Command, run_engine_in_process


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--kvpress-python", type=Path, required=True, help="that has kvpress")
    parser.add_argument("--model", type=Path, help="a folder; without it the embedded model")
    parser.add_argument("--budgets", nargs="+", type=int, default=(64, 128, 256))
    parser.add_argument("--document-tokens", type=int, default=400)
    parser.add_argument("--samples", type=int, default=4, help="of each of two tasks")


def _run(args: argparse.Namespace) -> int:
    run_engine_in_process()
    from adakv_serve.evals.answering.engine import ForcedEngine
    from adakv_serve.evals.crosscheck.compare import compare
    from adakv_serve.evals.tasks import samples
    from adakv_serve.serving.models.embedded import embedded_model_path

    model = args.model or embedded_model_path()
    engine = ForcedEngine(model, 2 * args.document_tokens + 1024)
    asked = [
        sample
        for task in ("factbook", "continuation")
        for sample in samples(task, engine.tokenizer, args.document_tokens, args.samples)
    ]
    print("| policy | keeps | in common | of the others ties | KL | agreement | in our engine |")
    print("|---|---|---|---|---|---|---|")
    for one in compare(args.kvpress_python, model, engine, asked, args.budgets):
        tied = "" if one.tied is None else f"{one.tied:.2f}"
        ours = "" if one.engine_kl is None else f"{one.engine_kl:.5f} / {one.engine_agreement:.3f}"
        print(
            f"| {one.policy} | {one.keep_tokens} | {one.common:.5f} | {tied} | {one.kl:.5f} "
            f"| {one.agreement:.3f} | {ours} |"
        )
    return 0


COMMAND = Command("crosscheck", "our selections against kvpress'", _add_options, _run)
