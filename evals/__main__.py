"""`python -m evals run`, `report` and the rest: docs/quality.md."""

import argparse
import os
import sys
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import httpx

from evals.policies import EVICTING_POLICIES, POLICIES
from evals.results.report import report
from evals.samples import MODES
from serving.models.embedded import EMBEDDED_MODEL_NAME

if TYPE_CHECKING:
    from evals.answering.engine import ForcedEngine
    from evals.answering.http import HttpServer
    from evals.results.scores import Row

# The engine in this process, where what it would have said can be heard.
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m evals", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="measure, and write a results file")
    running.add_argument("--modes", nargs="+", choices=MODES, help="without it all that can be")
    running.add_argument("--document-tokens", type=int, default=1024)
    running.add_argument("--samples", type=int, default=24, help="of each task")
    running.add_argument("--questions", type=int, help="of each document, at most")
    running.add_argument("--seed", type=int, default=0)
    running.add_argument(
        "--resume", action="store_true", help="ask only what --out has no results of yet"
    )
    _add_common(running)
    publishing = commands.add_parser("published", help="LongBench or RULER from a folder")
    where = publishing.add_mutually_exclusive_group(required=True)
    where.add_argument("--longbench", type=Path, help="with data/ and config/ as published")
    where.add_argument("--ruler", type=Path, help="with <task>/validation.jsonl")
    publishing.add_argument("--mode", choices=MODES, default=MODES[0])
    publishing.add_argument("--limit", type=int, help="of each task's questions")
    publishing.add_argument("--context-tokens", type=int, default=8192)
    _add_common(publishing)
    generating = commands.add_parser(
        "generation", help="long answers, with evictions while they are written"
    )
    generating.add_argument("--out", type=Path, required=True, help="a .jsonl file")
    generating.add_argument("--model", help="a folder or a hub id; without it the embedded model")
    generating.add_argument("--policies", nargs="+", default=EVICTING_POLICIES)
    generating.add_argument("--budgets", nargs="+", type=int, default=(64, 128, 256))
    generating.add_argument("--answer-tokens", type=int, default=1000, help="at most")
    generating.add_argument("--samples", type=int, default=12)
    generating.add_argument("--seed", type=int, default=0)
    generating.add_argument("--kv-bytes", type=int, help="without it enough for two whole contexts")
    reporting = commands.add_parser("report", help="print tables of results files")
    reporting.add_argument("results", nargs="+", type=Path)
    reporting.add_argument(
        "--plot", type=Path, help="draw fidelity against memory, as .svg or .png"
    )
    reporting.add_argument("--baseline", help="a policy to compare the others with")
    commands.add_parser(
        "fetch", help="fetch Qwen2.5-Coder-1.5B-Instruct (1.1 GB), and print where it is"
    )
    theory = commands.add_parser("theory", help="check the bound that Ada-KV rests on")
    theory.add_argument("--model", help="a folder or a hub id; without it the embedded model")
    theory.add_argument("--budgets", nargs="+", type=int, default=(64, 128, 256, 512))
    theory.add_argument("--document-tokens", type=int, default=1024)
    theory.add_argument("--samples", type=int, default=4, help="texts")
    checking = commands.add_parser("crosscheck", help="our selections against kvpress'")
    checking.add_argument("--kvpress-python", type=Path, required=True, help="that has kvpress")
    checking.add_argument("--model", type=Path, help="a folder; without it the embedded model")
    checking.add_argument("--budgets", nargs="+", type=int, default=(64, 128, 256))
    checking.add_argument("--document-tokens", type=int, default=400)
    checking.add_argument("--samples", type=int, default=4, help="of each of two tasks")
    gating = commands.add_parser("gate", help="whether the presets answer as was recorded")
    gating.add_argument("--record", action="store_true", help="record how they answer now")
    args = parser.parse_args(argv)
    commands_by_name = {
        "run": _run, "published": _published, "generation": _generation, "report": _report,
        "fetch": _fetch, "theory": _theory, "crosscheck": _crosscheck, "gate": _gate,
    }  # fmt: skip
    try:
        return commands_by_name[args.command](args)
    except (OSError, ValueError, httpx.HTTPError) as error:
        print(error, file=sys.stderr)
        return 1


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, help="a .jsonl file")
    parser.add_argument("--model", help="a folder or a hub id; without it the embedded model")
    parser.add_argument(
        "--server", help="base URL of an OpenAI-compatible server that has the model; text only"
    )
    parser.add_argument("--api-key", default=os.environ.get("OPENAI_API_KEY"))
    parser.add_argument("--tasks", nargs="+", help="without it all")
    parser.add_argument("--policies", nargs="+", default=POLICIES)
    parser.add_argument("--budgets", nargs="*", type=int, default=(64, 128, 256, 512))
    parser.add_argument("--ratios", nargs="*", type=float, default=())
    parser.add_argument("--kv-bytes", type=int, help="without it enough for two whole contexts")


def _run(args: argparse.Namespace) -> int:
    os.environ.update(_ENVIRONMENT)
    from evals.results.files import read_rows
    from evals.run import Plan, run
    from evals.tasks import TASKS

    if unknown := set(args.tasks or ()) - TASKS.keys():
        raise ValueError(
            f"unknown tasks {', '.join(sorted(unknown))}: known are {', '.join(TASKS)}"
        )
    _refuse_agnostic_servers(args.server, args.modes or ())
    _need_scorers()
    plan = Plan(
        args.tasks or list(TASKS), args.modes or (MODES[:1] if args.server else MODES),
        args.policies, args.budgets, args.ratios, args.document_tokens, args.samples, args.seed,
        args.questions,
    )  # fmt: skip
    earlier = read_rows(args.out) if args.resume and args.out.exists() else []
    answering = _answering(args, 2 * args.document_tokens + 1024, or_the_models=True)
    return _write(run(answering, _model_name(args), plan, earlier), args.out, earlier)


def _published(args: argparse.Namespace) -> int:
    os.environ.update(_ENVIRONMENT)
    from evals.published.longbench import read_longbench
    from evals.published.ruler import read_ruler
    from evals.published.run import run_published
    from evals.run import choices

    _refuse_agnostic_servers(args.server, [args.mode])
    _need_scorers()
    # All of them: a file that is not as published is told before anything is measured.
    if args.longbench:
        questions = list(read_longbench(args.longbench, args.tasks))
    else:
        questions = list(read_ruler(args.ruler, args.tasks))
    answering = _answering(args, args.context_tokens)
    tried = choices(args.policies, args.budgets, args.ratios)
    rows = run_published(
        answering, _model_name(args), questions, tried, args.mode, args.context_tokens, args.limit
    )
    return _write(rows, args.out)


def _generation(args: argparse.Namespace) -> int:
    os.environ.update(_ENVIRONMENT)
    import random

    from evals.answering.engine import ForcedEngine
    from evals.choice import Choice
    from evals.generation import run_generation
    from evals.tasks.source import Source
    from serving.models.embedded import embedded_model_path

    context_tokens = args.answer_tokens + 1024
    engine = ForcedEngine(args.model or embedded_model_path(), context_tokens, args.kv_bytes)
    source = Source(engine.tokenizer, context_tokens, random.Random(args.seed))
    choices = [
        Choice(policy, tokens=budget, decode_tokens=budget)
        for policy in args.policies
        for budget in args.budgets
    ]
    parts = run_generation(
        engine, _model_name(args), source, choices, args.samples, args.answer_tokens
    )
    return _write(parts, args.out)


def _refuse_agnostic_servers(server: str | None, modes: Iterable[str]) -> None:
    if server and "agnostic" in modes:
        raise ValueError("a server compresses a question with its document: only mode aware")


def _need_scorers() -> None:
    if missing := [name for name in ("rapidfuzz", "rouge") if find_spec(name) is None]:
        raise ValueError(f"no {' and no '.join(missing)}: pip install -e '.[evals]'")


def _model_name(args: argparse.Namespace) -> str:
    return Path(args.model).name if args.model else EMBEDDED_MODEL_NAME


def _answering(
    args: argparse.Namespace, context_tokens: int, *, or_the_models: bool = False
) -> "ForcedEngine | HttpServer":
    """Args: or_the_models: the model's context is enough where it is shorter."""
    from serving.models.embedded import embedded_model_path

    model = args.model or embedded_model_path()
    if args.server:
        from transformers import AutoTokenizer

        from evals.answering.http import HttpServer

        return HttpServer(args.server, AutoTokenizer.from_pretrained(model), args.api_key)
    from transformers import AutoConfig

    from evals.answering.engine import ForcedEngine

    if or_the_models:
        longest = AutoConfig.from_pretrained(model).max_position_embeddings
        context_tokens = min(context_tokens, longest)
    return ForcedEngine(model, context_tokens, args.kv_bytes)


def _write(parts: Iterable[list["Row"]], out: Path, earlier: Iterable["Row"] = ()) -> int:
    from evals.results.files import read_rows, write_rows

    for done in write_rows(parts, out, earlier):
        full = done[0]
        shares = f"exact {full.exact}" if full.metric is None else f"score {full.metric}"
        print(f"{full.mode} {full.task}: n={full.n}, full cache {shares}", flush=True)
    print(report(read_rows(out)))
    return 0


def _report(args: argparse.Namespace) -> int:
    from evals.results.files import read_rows

    rows = [row for path in args.results for row in read_rows(path)]
    print(report(rows, args.baseline))
    if args.plot:
        from evals.results.plots import draw

        draw(rows, args.plot)
    return 0


def _theory(args: argparse.Namespace) -> int:
    from transformers import AutoTokenizer

    from evals.samples import tokenize
    from evals.tasks import samples
    from evals.theory import SELECTIONS, ObservingModel, Summary, cases
    from serving.models.embedded import embedded_model_path

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


def _crosscheck(args: argparse.Namespace) -> int:
    os.environ.update(_ENVIRONMENT)
    from evals.answering.engine import ForcedEngine
    from evals.crosscheck.compare import compare
    from evals.tasks import samples
    from serving.models.embedded import embedded_model_path

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


def _gate(args: argparse.Namespace) -> int:
    os.environ.update(_ENVIRONMENT)
    from evals.answering.engine import ForcedEngine
    from evals.gate import PLAN, RECORDED, moved, recordable
    from evals.results.files import finished, read_rows, write_rows
    from evals.run import run
    from serving.models.embedded import embedded_model_path

    engine = ForcedEngine(embedded_model_path(), 2 * PLAN.document_tokens + 1024)
    rows = finished(run(engine, EMBEDDED_MODEL_NAME, PLAN))
    if args.record:
        list(write_rows([recordable(rows)], RECORDED))
        return 0
    lines = moved(read_rows(RECORDED), rows)
    print("\n".join(lines) or "every preset answers as was recorded")
    return 1 if lines else 0


def _fetch(args: argparse.Namespace) -> int:
    from evals.coder_model import fetch_coder_model

    print(fetch_coder_model(lambda text: print(text, file=sys.stderr, flush=True)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
