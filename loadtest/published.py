"""`python -m loadtest.published`: KV-Compress' set-up (arXiv 2410.00161), offline, on one GPU.

256 prompts of 6,000 tokens with 500 to generate, all at once, on Llama-3.1-8B's shape with random
weights: stock vLLM, stock with an fp8 KV cache, compression off, and from a half of the prompt to a
64th, which is bounded while decoding as well; all with the same KV bytes. An arm that compresses
gets fewer, by what it holds beside the KV blocks. One engine runs at a time, in its own process.

S_max, what stock would gain if decoding took no time, comes first. Published is 5.18 at a 64th.
"""

import argparse
import json
import math
import statistics
import sys
import tempfile
from pathlib import Path
from typing import IO, Any, NamedTuple

from loadtest.comparison.bound import bound
from loadtest.engines.dummy_models import SHAPES, write_shape
from loadtest.engines.process import EngineProcess

PUBLISHED = 5.18
_SHARES = {"half": 2, "quarter": 4, "eighth": 8, "sixteenth": 16, "64th": 64}
ARMS = ("stock", "stock-fp8", "off", *_SHARES)
_LEAST_BUDGET = 32
_FIGURES = (
    "elapsed_s", "output_tokens", "tokens_per_s", "decode_tokens_per_s", "peak_running", "blocks",
    "preemptions",
)  # fmt: skip


class Load(NamedTuple):
    requests: int
    prompt_tokens: int
    output_tokens: int


class Setup(NamedTuple):
    """The settings of all arms. beside_bytes: taken off the KV bytes of those that compress."""

    model: str
    engine: dict[str, Any]
    policy: str
    load: Load
    beside_bytes: int
    threads: int


def compression_of(arm: str, setup: Setup) -> dict[str, Any] | None:
    """Return the arm's compression settings; None for stock vLLM."""
    if arm.startswith("stock"):
        return None
    if arm == "off":
        return {"policy": "full"}
    share = _SHARES[arm]
    if share < 64:
        return {"policy": setup.policy, "budget_tokens": _LEAST_BUDGET, "keep_ratio": 1 / share}
    # The window and the first tokens are always kept.
    budget = max(-(-setup.load.prompt_tokens // share), 64)
    return {
        "policy": setup.policy, "budget_tokens": budget, "keep_ratio": 0.0,
        "decode_budget_tokens": budget,
    }  # fmt: skip


def start(arm: str, kv_bytes: int, setup: Setup, log: IO[str]) -> EngineProcess:
    beside = setup.beside_bytes if arm in _SHARES else 0
    engine = {**setup.engine, "kv_cache_memory_bytes": kv_bytes - beside}
    if arm == "stock-fp8":
        engine["kv_cache_dtype"] = "fp8"
    settings = {
        "model": setup.model, "engine": engine, "compression": compression_of(arm, setup),
        "text": False,
    }  # fmt: skip
    return EngineProcess(arm, settings, setup.threads, log)


def run_arm(arm: str, kv_bytes: int, setup: Setup, repeat: int, log: IO[str]) -> dict[str, Any]:
    """Return medians of one arm's rounds; for stock also the time of its prefills.

    Raises:
        RuntimeError: its engine died.
    """
    engine = start(arm, kv_bytes, setup, log)
    load = setup.load._asdict()
    try:
        engine.ask({**load, "requests": 2, "output_tokens": 8, "seed": -1})
        rounds = [engine.ask({**load, "seed": turn}) for turn in range(repeat)]
        figures: dict[str, Any] = {
            key: statistics.median(each[key] for each in rounds) for key in _FIGURES
        }
        figures["beside_bytes"] = statistics.median(each["extra_bytes"] for each in rounds)
        if arm == "stock":
            alone = engine.ask({**load, "output_tokens": 1, "seed": repeat})
            figures["prefill_s"] = alone["elapsed_s"]
    finally:
        engine.stop()
    return figures


def compare(figures: dict[str, Any], stock: dict[str, Any]) -> dict[str, Any]:
    """Return the arm's figures with its ratio to stock and the bound of that ratio."""
    gain = figures["decode_tokens_per_s"] / stock["decode_tokens_per_s"]
    limit = bound(stock["elapsed_s"], stock["prefill_s"], gain)
    ratio = figures["tokens_per_s"] / stock["tokens_per_s"]
    equal = figures["output_tokens"] == stock["output_tokens"]
    return {
        **figures, "ratio": ratio, "bound": limit, "share_of_bound": ratio / limit,
        "output_tokens_equal": equal,
    }  # fmt: skip


def run(
    kv_bytes: int, arms: list[str], setup: Setup, repeat: int, log: IO[str]
) -> dict[str, dict[str, Any]]:
    """Measure all arms at one size of KV memory, stock first; an arm that fails has its error."""
    load = setup.load
    print(
        f"\n{kv_bytes / (1 << 30):g} GiB of KV, {load.requests} prompts of {load.prompt_tokens} "
        f"tokens, {load.output_tokens} to generate", flush=True,
    )  # fmt: skip
    stock = run_arm("stock", kv_bytes, setup, repeat, log)
    s_max = bound(stock["elapsed_s"], stock["prefill_s"], math.inf)
    stock["s_max"] = s_max
    can = "can" if s_max > PUBLISHED else "cannot"
    print(
        f"S_max {s_max:.2f}: of stock's {stock['elapsed_s']:.1f} s prefills alone take "
        f"{stock['prefill_s']:.1f}; the published {PUBLISHED} {can} be beaten here", flush=True,
    )  # fmt: skip
    print(
        "arm        tokens/s  ratio  bound  of it  running  preempted   decode  beside", flush=True
    )
    results = {"stock": compare(stock, stock)}
    _print("stock", results["stock"])
    for arm in arms:
        if arm == "stock":
            continue
        try:
            results[arm] = compare(run_arm(arm, kv_bytes, setup, repeat, log), stock)
            _print(arm, results[arm])
        except RuntimeError as error:
            results[arm] = {"failed": str(error)}
            print(f"{arm:10} {error}", flush=True)
    return results


def _print(arm: str, row: dict[str, Any]) -> None:
    note = "" if row["output_tokens_equal"] else "  OTHER output tokens"
    print(
        f"{arm:10} {row['tokens_per_s']:8.1f} {row['ratio']:6.2f} {row['bound']:6.2f} "
        f"{row['share_of_bound']:6.2f} {row['peak_running']:8.0f} {row['preemptions']:10.0f} "
        f"{row['decode_tokens_per_s']:8.1f} {row['beside_bytes'] / (1 << 20):5.0f} MiB{note}",
        flush=True,
    )


def _model(args: argparse.Namespace, folder: Path) -> str:
    if args.model == "embedded":
        from serving.models.embedded import embedded_model_path

        return str(embedded_model_path())
    return args.model or str(write_shape(args.shape, folder))


def _engine(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    cuda = torch.cuda.is_available()
    length = args.prompt_tokens + args.output_tokens
    engine = {
        "dtype": "bfloat16" if cuda else "float32", "block_size": 16 if cuda else 32,
        "max_model_len": length + 1, "max_num_seqs": args.requests if cuda else 16,
        "max_num_batched_tokens": 8192, "enforce_eager": not cuda, "skip_tokenizer_init": True,
        "enable_prefix_caching": True,
    }  # fmt: skip
    if args.model is None:
        engine["load_format"] = "dummy"
    return {**engine, **json.loads(args.engine)}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m loadtest.published", description=__doc__)
    parser.add_argument("--kv-gib", type=float, nargs="+", default=[3, 8, 24])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--shape", choices=list(SHAPES), default="llama-3.1-8b")
    parser.add_argument(
        "--model", help="a folder or hub id with weights, or `embedded`, instead of a shape"
    )
    parser.add_argument("--policy", default="kv_compress")
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--prompt-tokens", type=int, default=6000)
    parser.add_argument("--output-tokens", type=int, default=500)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--beside-mib", type=float, default=384, help="taken off ours")
    parser.add_argument("--engine", default="{}", help="vLLM's engine arguments, as JSON")
    parser.add_argument("--threads", type=int, default=1, help="of each engine, on CPUs")
    parser.add_argument("--json", type=Path, help="write the figures here, after each size")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    load = Load(args.requests, args.prompt_tokens, args.output_tokens)
    results: dict[str, Any] = {}
    with (
        tempfile.TemporaryDirectory(prefix="adakv-shape-") as folder,
        tempfile.NamedTemporaryFile(
            "w", prefix="adakv-published-", suffix=".log", delete=False
        ) as log,
    ):
        print(f"the engines' log is {log.name}", flush=True)
        model = _model(args, Path(folder))
        try:
            engine = _engine(args)
        except ValueError as error:
            print(f"loadtest.published: --engine: {error}", file=sys.stderr)
            return 2
        beside = int(args.beside_mib * (1 << 20))
        setup = Setup(model, engine, args.policy, load, beside, args.threads)
        for gib in args.kv_gib:
            try:
                arms = run(int(gib * (1 << 30)), args.arms, setup, args.repeat, log)
            except RuntimeError as error:
                print(f"loadtest.published: {error}", file=sys.stderr)
                return 1
            results[f"{gib:g} GiB"] = arms
            if args.json:
                args.json.write_text(json.dumps(results, indent=2) + "\n")
    failed = [arm for arms in results.values() for arm, row in arms.items() if "failed" in row]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
