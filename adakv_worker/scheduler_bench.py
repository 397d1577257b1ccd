"""`python -m adakv_worker.scheduler_bench`: the cost of a scheduling step, stock vLLM's and ours.

A step is `schedule()` and `update_from_output()`, statistics included. No engine and no model: a
worker that computes nothing answers each step. Both schedulers live in this process, go through
the same lives of the same requests, and are timed in turn, so that noise hits both alike. Times are
the thread's CPU time: nothing in a step waits, and other work on the machine stays out of it.

Decode steps only decode. Prefill steps are those of a steady mix: one prompt begins and is
complete, and one of the other requests ends.
"""

import argparse
import gc
import itertools
import json
import logging
import random
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import vllm
from transformers import LlamaConfig
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from adakv_worker import plugin
from adakv_worker.commands import ATTRIBUTE, commands_of
from adakv_worker.manager import AdaKVSpec
from adakv_worker.scheduler import AdaKVScheduler

_BLOCK = 32
_PROMPT_TOKENS = 1500
_OUTPUT_TOKENS = 192
# The schedulers do not see these lengths in advance.
_MAX_TOKENS = 1024
_BUDGET = 256
_VOCABULARY, _TOKEN, _STOP = 32000, 7, 2
# More than the output lengths that admission remembers.
_ENDED_BEFORE = 72
_SPARE_SEATS = 256
_PRIORITIES = 4
_KINDS = ("decode", "prefill")
_SIDES = ("stock", "ours")
_QUARTILES = ("low", "median", "high")


Policy = Literal["fcfs", "priority"]


class Scenario(NamedTuple):
    """`running` requests, and `waiting` ones that lack what `lacking` names: seats or memory."""

    policy: Policy
    running: int
    waiting: int = 0
    lacking: str = "nothing"


class Step(NamedTuple):
    seconds: float
    begun: int
    preempted: int

    @property
    def kind(self) -> str | None:
        """None for a step that begins more than one prompt, or preempts."""
        return None if self.preempted or self.begun > 1 else _KINDS[self.begun]


class Side:
    """One scheduler, its requests, and a worker that computes nothing."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self._pool = scheduler.kv_cache_manager.block_pool
        self._random = random.Random(0)
        self._count = itertools.count()
        self._scenario = Scenario("fcfs", 0)
        # Blocks taken out of the pool, and how many are left free where memory is what lacks.
        self._taken: list[Any] = []
        self._free_blocks = 0
        hash_name = scheduler.cache_config.prefix_caching_hash_algo
        hash_function = get_hash_fn_by_name(hash_name)
        init_none_hash(hash_function)
        self._hasher = get_request_block_hasher(_BLOCK, hash_function)

    def add(self, prompt_tokens: int = _PROMPT_TOKENS, max_tokens: int = _MAX_TOKENS) -> None:
        index = next(self._count)
        # No two prompts share a block.
        start = [3 + index % 30000, 3 + index // 30000]
        params = SamplingParams(
            max_tokens=max_tokens, temperature=0.0, stop_token_ids=[_STOP], detokenize=False
        )
        request = Request(
            request_id=f"request-{index}",
            prompt_token_ids=start + [_TOKEN] * (prompt_tokens - 2),
            sampling_params=params,
            pooling_params=None,
            priority=self._random.randrange(_PRIORITIES),
            block_hasher=self._hasher,
        )
        self.scheduler.add_request(request)

    def step(self, at_most: int | None = None) -> Step:
        """Take one step; at its end so many requests end that `at_most` go on running."""
        began = time.thread_time()
        output = self.scheduler.schedule()
        scheduled = time.thread_time()
        answer = self._answer(output, at_most)
        answered = time.thread_time()
        self.scheduler.update_from_output(output, answer)
        seconds = scheduled - began + time.thread_time() - answered
        preempted = len(output.preempted_req_ids or ())
        return Step(seconds, len(output.scheduled_new_reqs), preempted)

    def _answer(self, output: SchedulerOutput, at_most: int | None) -> ModelRunnerOutput:
        names = list(output.num_scheduled_tokens)
        requests = self.scheduler.requests
        ending: set[str] = set()
        if at_most is not None and (surplus := len(self.scheduler.running) - at_most) > 0:
            # Those that have begun a while ago: outputs have lengths with a spread.
            old = [name for name in names if requests[name].num_output_tokens >= _OUTPUT_TOKENS / 4]
            ending = set(self._random.sample(old, surplus))
        tokens = [
            [_STOP if name in ending else _TOKEN]
            if requests[name].num_computed_tokens >= requests[name].num_tokens
            else []
            for name in names
        ]
        answer = ModelRunnerOutput(names, {name: i for i, name in enumerate(names)}, tokens)
        kept = (float(_BUDGET), _BUDGET // 2, 2 * _BUDGET)
        setattr(answer, ATTRIBUTE, dict.fromkeys(commands_of(output).compress, kept))
        return answer

    def fill(self, running: int) -> None:
        """Get `running` requests to run whose ages are spread, with output lengths learnt."""
        self._set_seats(running + _SPARE_SEATS)
        for _ in range(_ENDED_BEFORE):
            length = self._random.gauss(_OUTPUT_TOKENS, _OUTPUT_TOKENS / 4)
            self.add(_BLOCK, max(int(length), _BLOCK))
        while self.scheduler.has_unfinished_requests():
            self.step()
        for age in range(_OUTPUT_TOKENS):
            for _ in range(running * (age + 1) // _OUTPUT_TOKENS - running * age // _OUTPUT_TOKENS):
                self.add()
            self.step()
        while len(self.scheduler.running) < running:
            self.step()

    def enter(self, scenario: Scenario) -> None:
        self._scenario = scenario
        lacks_memory = scenario.lacking == "memory"
        self._set_seats(scenario.running + (_SPARE_SEATS if lacks_memory else 0))
        self._free_blocks = self._most_growth() if lacks_memory else 0
        self._shape_pool(0)
        if lacks_memory:
            # Find how many free blocks let one of the waiting requests begin.
            while self.advance(ends=True).begun == 0:
                pass
            self.advance(ends=False)

    def advance(self, *, ends: bool, begins: bool = True) -> Step:
        """Take one step of the scenario.

        Args:
            ends: one request ends with it.
            begins: one begins with it, where one has ended.
        """
        running = self._scenario.running
        missing = running - len(self.scheduler.running)
        while len(self.scheduler.waiting) < max(self._scenario.waiting, missing):
            self.add()
        step_size = max(16, self._free_blocks // 8)
        fewer = 0 if begins else 2 * step_size
        self._shape_pool(max(self._free_blocks - fewer, self._most_growth()))
        step = self.step(running - ends)
        if surplus := step.begun - begins:
            self._free_blocks -= _BLOCK * surplus if surplus > 0 else -step_size
        return step

    def _set_seats(self, seats: int) -> None:
        self.scheduler.max_num_running_reqs = self.scheduler.max_num_active_reqs = seats

    def _most_growth(self) -> int:
        """Return more blocks than a decode step takes and fewer than a waiting request needs."""
        phases = Counter(request.num_tokens % _BLOCK for request in self.scheduler.running)
        return max(phases.values(), default=0) + _BLOCK // 2

    def _shape_pool(self, free_blocks: int) -> None:
        """Make the pool so small that `free_blocks` are free, where memory is what lacks."""
        surplus = -len(self._taken)
        if self._scenario.lacking == "memory":
            surplus = max(surplus, self._pool.get_num_free_blocks() - free_blocks)
        if surplus > 0:
            self._taken += self._pool.get_new_blocks(surplus)
        elif surplus < 0:
            self._pool.free_blocks(self._taken[surplus:])
            del self._taken[surplus:]
        self._pool.num_gpu_blocks -= surplus


def make_side(model: Path, scenario: Scenario, *, ours: bool) -> Side:
    """Return a scheduler with memory for all requests that the scenario has running."""
    options: dict[str, Any] = {}
    if ours:
        settings = {"budget_tokens": _BUDGET, "keep_ratio": 0.0}
        options = plugin.engine_args(settings, asynchronous=False)
    most = scenario.running + _SPARE_SEATS
    config: VllmConfig = EngineArgs(
        model=str(model), skip_tokenizer_init=True, dtype="float32", block_size=_BLOCK,
        max_model_len=4096, max_num_seqs=most, max_num_batched_tokens=32768,
        enable_prefix_caching=True, scheduling_policy=scenario.policy, enforce_eager=True,
        **{"async_scheduling": False, **options},
    ).create_engine_config()  # fmt: skip
    blocks = most * -(-(_PROMPT_TOKENS + 2 * _OUTPUT_TOKENS) // _BLOCK)
    config.cache_config.num_gpu_blocks = blocks
    spec_type = AdaKVSpec if ours else FullAttentionSpec
    spec = spec_type(block_size=_BLOCK, num_kv_heads=2, head_size=32, dtype=torch.float32)
    cache = KVCacheConfig(blocks, [], [KVCacheGroupSpec(["layer"], spec)])
    scheduler = AdaKVScheduler if ours else Scheduler
    return Side(
        scheduler(config, cache, StructuredOutputManager(config), _BLOCK, _BLOCK, log_stats=True)
    )


@contextmanager
def _model_folder() -> Iterator[Path]:
    """Yield a folder with a model's configuration, which is all that a scheduler needs of it."""
    with tempfile.TemporaryDirectory() as folder:
        LlamaConfig(
            vocab_size=_VOCABULARY, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=4096,
            architectures=["LlamaForCausalLM"],
        ).save_pretrained(folder)  # fmt: skip
        yield Path(folder)


@contextmanager
def _no_collections() -> Iterator[None]:
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def measure(
    sides: dict[str, Side], scenario: Scenario, rounds: int, steps: int
) -> list[dict[str, Any]]:
    """Return a row for decode steps and one for prefill steps."""
    times: dict[tuple[str, str], list[float]] = defaultdict(list)

    def turn(kind: str | None, **what: bool) -> None:
        for name, side in sides.items():
            step = side.advance(**what)
            if kind is not None and step.kind == kind:
                times[kind, name].append(step.seconds * 1e3)

    for side in sides.values():
        side.enter(scenario)
    with _no_collections():
        for _ in range(rounds):
            # The step after a prefill still has work of it to do, the last one ends no request.
            turn(None, ends=False, begins=False)
            for _ in range(steps):
                turn("decode", ends=False, begins=False)
            turn(None, ends=True)
            for _ in range(steps):
                turn("prefill", ends=True)
            turn(None, ends=False)
    return [_row(scenario, kind, {name: times[kind, name] for name in sides}) for kind in _KINDS]


def _row(scenario: Scenario, kind: str, times: dict[str, list[float]]) -> dict[str, Any]:
    """Return quartiles in milliseconds; None where no such step was seen."""
    row: dict[str, Any] = {**scenario._asdict(), "step": kind, "ratio": None}
    for name, values in times.items():
        spread = statistics.quantiles(values, n=4) if len(values) > 1 else [None] * 3
        row |= {f"{name}_{part}_ms": value for part, value in zip(_QUARTILES, spread, strict=True)}
        row[f"{name}_steps"] = len(values)
    if row["stock_median_ms"] and row["ours_median_ms"]:
        row["ratio"] = row["ours_median_ms"] / row["stock_median_ms"]
    return row


def scenarios(policy: Policy, running: int, waiting: int) -> list[Scenario]:
    """Return what is measured with one pair of schedulers, in an order that they can follow."""
    queued = [Scenario(policy, running, waiting, lacking) for lacking in ("seats", "memory")]
    alone = [Scenario(policy, running)] if policy == "fcfs" else []
    return alone + (queued if waiting else [])


def report(running: Sequence[int], waiting: int, rounds: int, steps: int) -> list[dict[str, Any]]:
    """Print a line for each scenario and kind of step, and return them."""
    print(f"{'policy':10}{'waiting':>8} {'for':8}{'running':>8}  {'step':8}{'stock ms':>9}"
          f"{'ours ms':>9}{'ratio':>7}{'stock quartiles':>18}{'ours quartiles':>18}")  # fmt: skip
    rows = []
    policies: tuple[Policy, ...] = ("fcfs", "priority")
    for policy, count in itertools.product(policies, running):
        planned = scenarios(policy, count, waiting)
        if not planned:
            continue
        with _model_folder() as model:
            sides = {name: make_side(model, planned[0], ours=name == "ours") for name in _SIDES}
        for side in sides.values():
            side.fill(count)
        for scenario in planned:
            for row in measure(sides, scenario, rounds, steps):
                rows.append(row)
                print(_line(row), flush=True)
    return rows


def _line(row: dict[str, Any]) -> str:
    def number(key: str) -> str:
        return "-" if row[key] is None else f"{row[key]:.2f}"

    line = f"{row['policy']:10}{row['waiting']:8} {row['lacking']:8}{row['running']:8}"
    line += f"  {row['step']:8}{number('stock_median_ms'):>9}{number('ours_median_ms'):>9}"
    line += f"{number('ratio'):>7}"
    for name in _SIDES:
        line += f"{number(f'{name}_low_ms') + ' to ' + number(f'{name}_high_ms'):>18}"
    return line


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m adakv_worker.scheduler_bench")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--running", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--waiting", type=int, default=1000, help="0: only without a queue")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10, help="of each kind in a round")
    args = parser.parse_args(argv)
    if min(*args.running, args.rounds, args.steps) < 1 or args.waiting < 0:
        parser.error("--running, --rounds and --steps must be at least 1, --waiting at least 0")
    plugin.register()
    logging.disable(logging.WARNING)
    try:
        rows = report(args.running, args.waiting, args.rounds, args.steps)
    finally:
        logging.disable(logging.NOTSET)
    if args.json:
        args.json.write_text(json.dumps({"vllm": vllm.__version__, "steps": rows}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
