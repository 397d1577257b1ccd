"""`python -m evals gate`: compare the presets' answers with the recorded ones."""

import argparse

from adakv_serve.evals.commands.command import Command, run_engine_in_process
from adakv_serve.serving.models.embedded import EMBEDDED_MODEL_NAME


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--record", action="store_true", help="record how they answer now")


def _run(args: argparse.Namespace) -> int:
    run_engine_in_process()
    from adakv_serve.evals.answering.engine import ForcedEngine
    from adakv_serve.evals.gate import PLAN, RECORDED, moved, recordable
    from adakv_serve.evals.results.files import finished, read_rows, write_rows
    from adakv_serve.evals.run import run
    from adakv_serve.serving.models.embedded import embedded_model_path

    engine = ForcedEngine(embedded_model_path(), 2 * PLAN.document_tokens + 1024)
    rows = finished(run(engine, EMBEDDED_MODEL_NAME, PLAN))
    if args.record:
        list(write_rows([recordable(rows)], RECORDED))
        return 0
    lines = moved(read_rows(RECORDED), rows)
    print("\n".join(lines) or "every preset answers as was recorded")
    return 1 if lines else 0


COMMAND = Command("gate", "whether the presets answer as was recorded", _add_options, _run)
