"""`python -m adakv_worker.scheduler_bench`: the cost of a scheduling step, stock vLLM's and ours.

A step is `schedule()` and `update_from_output()`, with statistics. There is no engine: each step is
answered without computing anything. Both schedulers take their steps in turn in this process, so
that noise hits both alike. Times are CPU time of the thread, which leaves out other work on the
machine. Prefill steps are those of a steady mix: one prompt begins and is complete, and one of the
other requests ends.
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
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import vllm
from transformers import LlamaConfig
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from adakv_serve.kernels.blocks import blocks_for_tokens
from adakv_worker import plugin
from adakv_worker.core.scheduler import AdaKVScheduler
from adakv_worker.messages import Answer, Kept, attach_answer, commands_of
from adakv_worker.spec import AdaKVSpec

_BLOCK = 32
_PROMPT_TOKENS = 1500
_OUTPUT_TOKENS = 192
# The schedulers cannot see the output lengths in advance.
_MAX_TOKENS = 1024
_BUDGET = 256
_TOKEN, _STOP = 7, 2
# More than the output lengths that admission remembers.
_ENDED_BEFORE = 72
_SPARE_SEATS = 256
_MOST_TRIES = 1000


class Scenario(NamedTuple):
    """`running` requests, and `waiting` ones that lack what `lacking` names: seats or memory."""

    policy: str
    running: int
    waiting: int = 0
    lacking: str = "nothing"


class Step(NamedTuple):
    milliseconds: float
    begun: int
    preempted: int


class Side:
    """One scheduler, its requests, and a worker that computes nothing."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self._pool = scheduler.kv_cache_manager.block_pool
        self._random = random.Random(0)
        self._count = itertools.count()
        self._scenario = Scenario("fcfs", 0)
        # Where memory is lacking: the number of blocks left free, the blocks taken out of the pool
        # for that, and the number that the next step frees of prompts compressed in the last.
        self._free_blocks = 0
        self._taken: list[Any] = []
        self._returning = 0
        hash_function = get_hash_fn_by_name(scheduler.cache_config.prefix_caching_hash_algo)
        init_none_hash(hash_function)
        self._hasher = get_request_block_hasher(_BLOCK, hash_function)

    def add(self, prompt_tokens: int = _PROMPT_TOKENS, max_tokens: int = _MAX_TOKENS) -> None:
        index = next(self._count)
        # No two prompts share a block.
        start = [3 + index % 30000, 3 + index // 30000]
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0, stop_token_ids=[_STOP])
        request = Request(
            f"request-{index}", start + [_TOKEN] * (prompt_tokens - 2), params, None,
            priority=self._random.randrange(4), block_hasher=self._hasher,
        )  # fmt: skip
        self.scheduler.add_request(request)

    def step(self, at_most: int | None = None) -> Step:
        """Take one step, in which all but `at_most` requests end."""
        began = time.thread_time()
        output = self.scheduler.schedule()
        scheduled = time.thread_time()
        answer = self._answer(output, at_most)
        answered = time.thread_time()
        self.scheduler.update_from_output(output, answer)
        seconds = scheduled - began + time.thread_time() - answered
        begun = len(output.scheduled_new_reqs) + len(output.scheduled_cached_reqs.resumed_req_ids)
        return Step(seconds * 1e3, begun, len(output.preempted_req_ids or ()))

    def _answer(self, output: SchedulerOutput, at_most: int | None) -> ModelRunnerOutput:
        # All running requests, the oldest first: a step has room for any number of prompts.
        names = list(output.num_scheduled_tokens)
        surplus = 0 if at_most is None else max(0, len(names) - at_most)
        # Outputs differ in length.
        ending = set(self._random.sample(names[: max(surplus, len(names) // 2)], surplus))
        tokens = [[_STOP if name in ending else _TOKEN] for name in names]
        answer = ModelRunnerOutput(names, {name: i for i, name in enumerate(names)}, tokens)
        kept = Kept(float(_BUDGET), _BUDGET // 2, 2 * _BUDGET)
        compressed = commands_of(output).compress
        attach_answer(answer, Answer(dict.fromkeys(compressed, kept), []))
        self._returning = len(compressed) * blocks_for_tokens(_PROMPT_TOKENS, _BLOCK)
        return answer

    def fill(self, running: int) -> None:
        """Start `running` requests of different ages, after others have taught output lengths."""
        self._set_seats(running + _SPARE_SEATS)
        for _ in range(_ENDED_BEFORE):
            self.add(_BLOCK, int(self._random.triangular(_OUTPUT_TOKENS / 2, _OUTPUT_TOKENS * 1.5)))
        while self.scheduler.has_unfinished_requests():
            self.step()
        for age in range(_OUTPUT_TOKENS):
            for _ in range(running * (age + 1) // _OUTPUT_TOKENS - running * age // _OUTPUT_TOKENS):
                self.add()
            self.step()

    def enter(self, scenario: Scenario) -> None:
        self._scenario = scenario
        if scenario.lacking != "memory":
            self._set_seats(scenario.running)
            return
        self._set_seats(scenario.running + _SPARE_SEATS)
        self._free_blocks = self._most_growth()
        # Find how many free blocks let one of the waiting requests begin.
        if not any(self.advance(ends=True).begun for _ in range(_MOST_TRIES)):
            raise RuntimeError(f"none of the waiting requests began in {_MOST_TRIES} steps")
        for _ in range(_BLOCK):
            self.advance(ends=True)
        self.advance(ends=False)

    def advance(self, *, ends: bool, begins: bool = True) -> Step:
        """Take a step in which one request begins, if one has ended, and one ends."""
        running = self._scenario.running
        missing = running - len(self.scheduler.running)
        while len(self.scheduler.waiting) < max(self._scenario.waiting, missing):
            self.add()
        correction = max(_BLOCK // 2, self._free_blocks // 8)
        if self._scenario.lacking == "memory":
            wanted = max(self._free_blocks if begins else 0, self._most_growth())
            self._shape_pool(max(wanted - self._returning, 0))
        step = self.step(running - ends)
        if surplus := step.begun - begins:
            self._free_blocks -= _BLOCK * surplus if surplus > 0 else -correction
        return step

    def _set_seats(self, seats: int) -> None:
        self.scheduler.max_num_running_reqs = self.scheduler.max_num_active_reqs = seats

    def _most_growth(self) -> int:
        """Return a count between what a decode step takes and what a waiting request needs."""
        phases = Counter(request.num_tokens % _BLOCK for request in self.scheduler.running)
        return max(phases.values(), default=0) + _BLOCK // 2

    def _shape_pool(self, free_blocks: int) -> None:
        """Make the pool so small that `free_blocks` are free."""
        surplus = max(self._pool.get_num_free_blocks() - free_blocks, -len(self._taken))
        if surplus > 0:
            self._taken += self._pool.get_new_blocks(surplus)
        elif surplus < 0:
            self._pool.free_blocks(self._taken[surplus:])
            del self._taken[surplus:]
        self._pool.num_gpu_blocks -= surplus


def make_side(scenario: Scenario, *, ours: bool) -> Side:
    """Return a scheduler with memory for all requests that the scenario has running."""
    options: dict[str, Any] = {"async_scheduling": False, "scheduling_policy": scenario.policy}
    if ours:
        settings = {"budget_tokens": _BUDGET, "keep_ratio": 0.0}
        options |= plugin.engine_args(settings, asynchronous=False)
    seats = scenario.running + _SPARE_SEATS
    with tempfile.TemporaryDirectory() as model:
        LlamaConfig(
            hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=4096, architectures=["LlamaForCausalLM"],
        ).save_pretrained(model)  # fmt: skip
        config = EngineArgs(
            model=model, skip_tokenizer_init=True, dtype="float32", block_size=_BLOCK,
            max_model_len=4096, max_num_seqs=seats, max_num_batched_tokens=seats * _PROMPT_TOKENS,
            enable_prefix_caching=True, enforce_eager=True, **options,
        ).create_engine_config()  # fmt: skip
    blocks = seats * blocks_for_tokens(_PROMPT_TOKENS + 2 * _OUTPUT_TOKENS, _BLOCK)
    config.cache_config.num_gpu_blocks = blocks
    spec, scheduler = (AdaKVSpec, AdaKVScheduler) if ours else (FullAttentionSpec, Scheduler)
    layer = spec(block_size=_BLOCK, num_kv_heads=2, head_size=32, dtype=torch.float32)
    cache = KVCacheConfig(blocks, [], [KVCacheGroupSpec(["layer"], layer)])
    grammars = StructuredOutputManager(config)
    return Side(scheduler(config, cache, grammars, _BLOCK, _BLOCK, log_stats=True))


def measure(
    sides: dict[str, Side], scenario: Scenario, rounds: int, steps: int
) -> list[dict[str, Any]]:
    """Return a row for decode steps and one for prefill steps."""
    times: dict[str, Any] = {kind: {name: [] for name in sides} for kind in ("decode", "prefill")}

    def turns(count: int, *, counted: bool = True, ends: bool, begins: bool = True) -> None:
        for _, (name, side) in itertools.product(range(count), sides.items()):
            step = side.advance(ends=ends, begins=begins)
            if counted and step.begun == begins and not step.preempted:
                times["prefill" if begins else "decode"][name].append(step.milliseconds)

    for side in sides.values():
        side.enter(scenario)
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        for _ in range(rounds):
            # The step after a prefill still frees its blocks.
            turns(1, counted=False, ends=False, begins=False)
            turns(steps, ends=False, begins=False)
            turns(1, counted=False, ends=True)
            turns(steps, ends=True)
            turns(1, counted=False, ends=False)
    finally:
        gc.enable()
        gc.unfreeze()
    return [{**scenario._asdict(), "step": kind, **_figures(times[kind])} for kind in times]


def _figures(times: dict[str, list[float]]) -> dict[str, Any]:
    """Return quartiles; None where no such step was seen."""
    figures: dict[str, Any] = {}
    for name, values in times.items():
        spread = statistics.quantiles(values, n=4) if len(values) > 1 else [None] * 3
        keys = [f"{name}_{quartile}_ms" for quartile in ("low", "median", "high")]
        figures |= {**dict(zip(keys, spread, strict=True)), f"{name}_steps": len(values)}
    stock, ours = figures["stock_median_ms"], figures["ours_median_ms"]
    return {**figures, "ratio": ours / stock if ours and stock else None}


def report(running: Sequence[int], waiting: int, rounds: int, steps: int) -> list[dict[str, Any]]:
    """Print a line for each scenario and kind of step, and return them."""
    print(f"{'policy':10}{'waiting':>8} {'for':8}{'running':>8}  {'step':8}"
          f"{'stock ms':>9}{'ours ms':>9}{'ratio':>9}")  # fmt: skip
    rows = []
    policies = ("fcfs", "priority") if waiting else ("fcfs",)
    for policy, count in itertools.product(policies, running):
        planned = [Scenario(policy, count)] if policy == "fcfs" else []
        if waiting:
            planned += [Scenario(policy, count, waiting, lack) for lack in ("seats", "memory")]
        sides = {name: make_side(planned[0], ours=name == "ours") for name in ("stock", "ours")}
        for side in sides.values():
            side.fill(count)
        for scenario in planned:
            for row in measure(sides, scenario, rounds, steps):
                rows.append(row)
                values = (row["stock_median_ms"], row["ours_median_ms"], row["ratio"])
                columns = (f"{'-':>9}" if value is None else f"{value:9.2f}" for value in values)
                print(f"{policy:10}{row['waiting']:8} {row['lacking']:8}{count:8}  {row['step']:8}",
                      *columns, sep="", flush=True)  # fmt: skip
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m adakv_worker.scheduler_bench")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--running", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--waiting", type=int, default=1000, help="0: only without a queue")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10, help="of each kind, in a round")
    args = parser.parse_args(argv)
    if min(*args.running, args.rounds, args.steps) < 1 or args.waiting < 0:
        parser.error("--running, --rounds and --steps must be at least 1, --waiting at least 0")
    plugin.register()
    rows = report(args.running, args.waiting, args.rounds, args.steps)
    if args.json:
        args.json.write_text(json.dumps({"vllm": vllm.__version__, "steps": rows}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    sys.exit(main())
