"""`python -m evals theory`: check Ada-KV's bound on a model's own attention."""

import argparse

from adakv_serve.evals.commands.command import Command, add_model_option


def _add_options(parser: argparse.ArgumentParser) -> None:
    add_model_option(parser)
    parser.add_argument("--budgets", nargs="+", type=int, default=(64, 128, 256, 512))
    parser.add_argument("--document-tokens", type=int, default=1024)
    parser.add_argument("--samples", type=int, default=4, help="texts")


def _run(args: argparse.Namespace) -> int:
    from transformers import AutoTokenizer

    from adakv_serve.evals.samples import tokenize
    from adakv_serve.evals.tasks import samples
    from adakv_serve.evals.theory import SELECTIONS, ObservingModel, Summary, cases
    from adakv_serve.serving.models.embedded import embedded_model_path

    path = args.model or embedded_model_path()
    model, tokenizer = ObservingModel(path), AutoTokenizer.from_pretrained(path)
    found = [
        case
        for sample in samples("needles", tokenizer, args.document_tokens, args.samples)
        for case in cases(
            model.observations(tokenize(sample, tokenizer, "aware").prompt), args.budgets
        )
    ]
    for selection in SELECTIONS:
        for budget in args.budgets:
            mine = [c for c in found if (c.selection, c.keep_tokens) == (selection, budget)]
            print(selection, budget, Summary.of(mine))
    return 0


COMMAND = Command("theory", "check the bound that Ada-KV rests on", _add_options, _run)
