"""Options and checks of the commands that ask an engine or a server."""

import argparse
import os
from collections.abc import Iterable
from importlib.util import find_spec

from adakv_serve.evals.answering import Answering
from adakv_serve.evals.commands.command import add_kv_bytes_option, add_model_option, add_out_option
from adakv_serve.evals.policies import POLICIES


def add_options(parser: argparse.ArgumentParser) -> None:
    add_out_option(parser)
    add_model_option(parser)
    parser.add_argument(
        "--server", help="base URL of an OpenAI-compatible server that has the model; text only"
    )
    parser.add_argument("--api-key", default=os.environ.get("OPENAI_API_KEY"))
    parser.add_argument("--tasks", nargs="+", help="without it all")
    parser.add_argument("--policies", nargs="+", default=POLICIES)
    parser.add_argument("--budgets", nargs="*", type=int, default=(64, 128, 256, 512))
    parser.add_argument("--ratios", nargs="*", type=float, default=())
    parser.add_argument(
        "--page-dtype", choices=("auto", "fp8", "fp8_e5m2", "int8", "int4"), default="auto",
        help="how compressed prompts are stored, in an engine in this process",
    )  # fmt: skip
    parser.add_argument(
        "--page-rounding", choices=("int8", "int4"),
        help="simulate pages of these bits, with a scale for each entry: what stays of a prompt is "
        "rounded, in pages of full precision",
    )  # fmt: skip
    add_kv_bytes_option(parser)


def check(
    server: str | None,
    modes: Iterable[str],
    page_dtype: str = "auto",
    page_rounding: str | None = None,
) -> None:
    """
    Raises:
        ValueError: the server cannot do a mode, or a package that scores answers is missing.
    """
    if server and "agnostic" in modes:
        raise ValueError("a server compresses a question with its document: only mode aware")
    if server and (page_dtype != "auto" or page_rounding is not None):
        raise ValueError("a server has its own page_dtype")
    if page_dtype != "auto" and page_rounding is not None:
        raise ValueError("--page-rounding simulates a page_dtype: give one of the two")
    if missing := [name for name in ("rapidfuzz", "rouge") if find_spec(name) is None]:
        raise ValueError(f"no {' and no '.join(missing)}: pip install -e '.[evals]'")


def answering(
    args: argparse.Namespace, context_tokens: int, *, or_the_models: bool = False
) -> Answering:
    """Return the server of `--server`, or else an engine in this process.

    Args:
        or_the_models: cut `context_tokens` to the model's context.
    """
    from adakv_serve.serving.models.embedded import embedded_model_path

    model = args.model or embedded_model_path()
    if args.server:
        from transformers import AutoTokenizer

        from adakv_serve.evals.answering.http import HttpServer

        return HttpServer(args.server, AutoTokenizer.from_pretrained(model), args.api_key)
    from transformers import AutoConfig

    from adakv_serve.evals.answering.engine import ForcedEngine

    if or_the_models:
        longest = AutoConfig.from_pretrained(model).max_position_embeddings
        context_tokens = min(context_tokens, longest)
    return ForcedEngine(
        model, context_tokens, args.kv_bytes,
        page_dtype=args.page_dtype, page_rounding=args.page_rounding,
    )  # fmt: skip
