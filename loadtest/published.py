"""`python -m loadtest.published`: KV-Compress' set-up (arXiv 2410.00161), offline, on one GPU.

256 prompts of 6,000 tokens with 500 to generate, all at once, on Llama-3.1-8B's shape with random
weights: stock vLLM, stock with a KV cache of fewer bits, compression off, and from a half of the
prompt to a 64th, which is bounded while decoding as well; all with the same KV bytes. An arm that
compresses gets fewer, by what it holds beside the KV blocks. Each arm's engine has a process of its
own, and one of them runs at a time; with `--at-once` several start together, which saves time.

S_max, what stock would gain if decoding took no time, comes first. Published is 5.18 at a 64th.
With `--profile N`, each arm also prints where the time of a prompt goes, and that of a step with N
decoding requests.
"""

import argparse
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from adakv_serve.loadtest.comparison.bound import bound
from adakv_serve.loadtest.engines.dummy_models import SHAPES, write_shape
from adakv_serve.loadtest.engines.process import EngineProcess
from adakv_serve.loadtest.engines.published_arms import ARMS, MORE_ARMS, Load, Setup, start

PUBLISHED = 5.18
# Requests whose steps are profiled: short, so that all of them fit into any arm's KV memory.
_PROFILED = {"prompt_tokens": 192, "profile_steps": 16, "seed": -2}
# Prompts that are profiled one by one, and the seed of the first.
_PROFILED_PROMPTS = {"profile_prompts": 3, "seed": -100}
# What engines take of a GPU's memory.
_GPU_SHARE = 0.9
_FIGURES = (
    "elapsed_s", "output_tokens", "tokens_per_s", "decode_tokens_per_s", "peak_running", "blocks",
    "preemptions", "compress_s", "evict_s",
)  # fmt: skip


def run_arm(engine: EngineProcess, stock: bool, load: Load, repeat: int) -> dict[str, Any]:
    """Return medians of one arm's rounds; for stock also the time of its prefills.

    Raises:
        RuntimeError: its engine died.
    """
    command = load._asdict()
    rounds = [engine.ask({**command, "seed": turn}) for turn in range(repeat)]
    figures: dict[str, Any] = {
        key: statistics.median(each[key] for each in rounds) for key in _FIGURES
    }
    figures["beside_bytes"] = statistics.median(each["extra_bytes"] for each in rounds)
    if stock:
        alone = engine.ask({**command, "output_tokens": 1, "seed": repeat})
        figures["prefill_s"] = alone["elapsed_s"]
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


class Plan(NamedTuple):
    """What to measure of every arm.

    at_once: engines that start together. profile: numbers of requests whose steps are profiled.
    """

    arms: Sequence[str]
    repeat: int = 1
    at_once: int = 1
    profile: Sequence[int] = ()


class Comparison:
    """All arms at one size of KV memory, stock first."""

    def __init__(
        self, kv_bytes: int, setup: Setup, plan: Plan, log: IO[str], save: Callable[[], None]
    ) -> None:
        """
        Args:
            save: called after each arm.
        """
        self._save = save
        self._kv_bytes = kv_bytes
        self._setup = setup
        self._plan = plan
        self._log = log
        # Each arm's figures, or the error of one that failed.
        self.results: dict[str, dict[str, Any]] = {}

    def run(self) -> None:
        """Measure and print every arm.

        Raises:
            RuntimeError: stock failed, without which there is nothing to compare with.
        """
        load = self._setup.load
        print(
            f"\n{self._kv_bytes / (1 << 30):g} GiB of KV, {load.requests} prompts of "
            f"{load.prompt_tokens} tokens, {load.output_tokens} to generate", flush=True,
        )  # fmt: skip
        arms = ["stock", *(arm for arm in self._plan.arms if arm != "stock")]
        for first in range(0, len(arms), self._plan.at_once):
            self._run_group(arms[first : first + self._plan.at_once])

    def _run_group(self, arms: Sequence[str]) -> None:
        engines = {
            arm: start(arm, self._kv_bytes, self._setup, self._log) for arm in arms
        }  # fmt: skip
        try:
            for arm, engine in engines.items():
                with self._failures(arm):
                    warm = {**self._setup.load._asdict(), "requests": 2, "output_tokens": 8}
                    engine.ask({**warm, "seed": -1})
            for arm, engine in engines.items():
                if arm not in self.results:
                    with self._failures(arm):
                        self._measure(arm, engine)
                    self._save()
        finally:
            for engine in engines.values():
                engine.ask_to_end()
            for engine in engines.values():
                engine.stop()

    @contextmanager
    def _failures(self, arm: str) -> Iterator[None]:
        """Note and print the error of an arm, which does not stop the others."""
        try:
            yield
        except RuntimeError as error:
            if arm == "stock":
                raise
            self.results[arm] = {**self.results.get(arm, {}), "failed": str(error)}
            print(f"{arm:10} {error}", flush=True)

    def _measure(self, arm: str, engine: EngineProcess) -> None:
        figures = run_arm(engine, arm == "stock", self._setup.load, self._plan.repeat)
        if arm == "stock":
            figures["s_max"] = _print_limit(figures)
        self.results[arm] = compare(figures, self.results.get("stock", figures))
        _print(arm, self.results[arm])
        profiles = self.results[arm]["profiles"] = {}
        if self._plan.profile:
            load = {**_PROFILED_PROMPTS, "prompt_tokens": self._setup.load.prompt_tokens}
            profiles["prompt"] = engine.ask(load)
            _print_profile("a prompt and a token", profiles["prompt"])
        for requests in self._plan.profile:
            profiles[requests] = engine.ask({**_PROFILED, "requests": requests})
            _print_profile(f"a step of {requests} that decode", profiles[requests])


def _print_limit(stock: dict[str, Any]) -> float:
    s_max = bound(stock["elapsed_s"], stock["prefill_s"], math.inf)
    can = "can" if s_max > PUBLISHED else "cannot"
    print(
        f"S_max {s_max:.2f}: of stock's {stock['elapsed_s']:.1f} s prefills alone take "
        f"{stock['prefill_s']:.1f}; the published {PUBLISHED} {can} be beaten here", flush=True,
    )  # fmt: skip
    print(
        "arm        tokens/s  ratio  bound  of it  running  preempted   decode  beside", flush=True
    )
    return s_max


def _print_profile(what: str, row: dict[str, Any]) -> None:
    host = ", ".join(f"{name} {seconds * 1e3:.2f}" for name, seconds in row["host"].items())
    print(
        f"    {what}: {row['step_s'] * 1e3:.2f} ms, the GPU computes "
        f"{row['gpu_busy_share']:.0%} of it; ms of the host: {host}"[:400], flush=True,
    )  # fmt: skip


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
        from adakv_serve.serving.models.embedded import embedded_model_path

        return str(embedded_model_path())
    return args.model or str(write_shape(args.shape, folder))


def _engine(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    cuda = torch.cuda.is_available()
    length = args.prompt_tokens + args.output_tokens
    engine = {
        "dtype": "bfloat16" if cuda else "float32", "block_size": 16 if cuda else 32,
        "max_model_len": length + 1,
        "max_num_seqs": max([args.requests, *args.profile]) if cuda else 16,
        "max_num_batched_tokens": 8192, "enforce_eager": not cuda, "skip_tokenizer_init": True,
        "enable_prefix_caching": True,
    }  # fmt: skip
    if cuda:
        engine["gpu_memory_utilization"] = round(_GPU_SHARE / args.at_once, 3)
    if args.model is None:
        engine["load_format"] = "dummy"
    return {**engine, **json.loads(args.engine)}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m loadtest.published", description=__doc__)
    parser.add_argument("--kv-gib", type=float, nargs="+", default=[3, 8, 24])
    parser.add_argument("--arms", nargs="+", choices=(*ARMS, *MORE_ARMS), default=list(ARMS))
    parser.add_argument("--shape", choices=list(SHAPES), default="llama-3.1-8b")
    parser.add_argument(
        "--model", help="a folder or hub id with weights, or `embedded`, instead of a shape"
    )
    parser.add_argument("--policy", default="kv_compress")
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--prompt-tokens", type=int, default=6000)
    parser.add_argument("--output-tokens", type=int, default=500)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument(
        "--at-once", type=int, default=1,
        help="engines that start together, as memory allows",
    )  # fmt: skip
    parser.add_argument(
        "--profile", type=int, nargs="*", default=[],
        help="profile prompts, and steps of so many decoding requests, in each arm",
    )  # fmt: skip
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

        def save() -> None:
            if args.json:
                args.json.write_text(json.dumps(results, indent=2) + "\n")

        plan = Plan(args.arms, args.repeat, args.at_once, args.profile)
        for gib in args.kv_gib:
            comparison = Comparison(int(gib * (1 << 30)), setup, plan, log, save)
            results[f"{gib:g} GiB"] = comparison.results
            try:
                comparison.run()
            except RuntimeError as error:
                print(f"loadtest.published: {error}", file=sys.stderr)
                return 1
    failed = [arm for arms in results.values() for arm, row in arms.items() if "failed" in row]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
