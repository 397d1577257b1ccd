"""One arm of `loadtest.offline` or `loadtest.published`: an engine that answers a round per line.

Counts come from vLLM's own statistics of each step, and what compression takes from our worker's
timings; the engine runs in this process, stock or not.
"""

import json
import random
import sys
import time
from pydoc_data import topics
from typing import Any

from vllm import EngineArgs, LLMEngine, SamplingParams
from vllm.sampling_params import RequestOutputKind
from vllm.v1.metrics.loggers import StatLoggerBase
from vllm.v1.metrics.stats import SchedulerIterationDetails

from adakv_serve.loadtest.engines.rounds import Compression, Step, step_figures
from adakv_serve.loadtest.engines.step_profile import profile_steps


class StepCounts(StatLoggerBase):
    """vLLM's counts of the last step, and all preemptions since the last reset."""

    def __init__(self) -> None:
        self.details: SchedulerIterationDetails | None = None
        self.preemptions = 0

    def record(
        self, scheduler_stats: Any, iteration_stats: Any, *_args: Any, **_kwargs: Any
    ) -> None:
        if scheduler_stats is not None:
            self.details = scheduler_stats.iteration_details
        if iteration_stats is not None:
            self.preemptions += iteration_stats.num_preempted_reqs

    def log_engine_initialized(self) -> None:
        pass

    def take_step(self, seconds: float) -> Step | None:
        """Return the last step that was not taken yet; None where nothing was computed."""
        details, self.details = self.details, None
        if details is None:
            return None
        return Step.of(
            seconds,
            details.num_ctx_tokens,
            details.num_generation_requests,
            details.num_generation_tokens,
        )


class Engine:
    """vLLM with or without compression."""

    def __init__(self, settings: dict[str, Any]) -> None:
        """
        Args:
            settings: `model`; `engine`, vLLM's arguments; `compression`, None for stock vLLM;
                `text`, whether prompts are text instead of random tokens.
        """
        arguments = {
            **settings["engine"],
            "disable_log_stats": False,
            "enable_logging_iteration_details": True,
        }
        self._compresses = settings["compression"] is not None
        if self._compresses:
            from adakv_worker.plugin import engine_args

            arguments |= engine_args(settings["compression"])
        self._text = settings["text"]
        self._counts = StepCounts()
        self._engine = LLMEngine.from_engine_args(
            EngineArgs(model=settings["model"], **arguments),
            stat_loggers=[lambda *_: self._counts],
        )
        core: Any = self._engine.engine_core
        self._scheduler = core.engine_core.scheduler

    def round(self, command: dict[str, Any]) -> dict[str, Any]:
        """Answer all requests of a command; return the round's figures."""
        names = self._add(command)
        self._counts.preemptions = 0
        if self._compresses:
            self._engine.collective_rpc("adakv_start_timings")
        steps: list[Step] = []
        held: list[float] = []
        answers: dict[str, list[int]] = {name: [] for name in names}
        peak_running = 0
        pool = self._scheduler.kv_cache_manager.block_pool
        blocks = pool.num_gpu_blocks - 1
        started = last = time.perf_counter()
        while self._engine.has_unfinished_requests():
            outputs: Any = self._engine.step()
            now = time.perf_counter()
            for output in outputs:
                answers[output.request_id] += output.outputs[0].token_ids
            running = len(self._scheduler.running)
            peak_running = max(peak_running, running)
            if step := self._counts.take_step(now - last):
                steps.append(step)
                last = now
                if running and not step.prefill_tokens:
                    held.append((blocks - pool.get_num_free_blocks()) / running)
        elapsed = time.perf_counter() - started
        tokens = sum(map(len, answers.values()))
        return {
            "tokens_per_s": tokens / elapsed,
            "output_tokens": tokens,
            "elapsed_s": elapsed,
            "peak_running": peak_running,
            "blocks": blocks,
            "blocks_per_request": sum(held) / max(len(held), 1),
            "preemptions": self._counts.preemptions,
            "answers": list(answers.values()),
            **step_figures(steps, self._compression()),
        }

    def profile_prompts(self, command: dict[str, Any]) -> dict[str, Any]:
        """Profile prompts that are alone, each until its second token; as `profile_steps` does."""
        seed = command["seed"]

        def answer() -> None:
            nonlocal seed
            self._add({**command, "requests": 1, "output_tokens": 2, "seed": seed})
            while self._engine.has_unfinished_requests():
                self._engine.step()
            seed -= 1

        answer()
        return profile_steps(answer, command["profile_prompts"])

    def profile(self, command: dict[str, Any]) -> dict[str, Any]:
        """Profile steps of `requests` that all decode; return what `profile_steps` does.

        Raises:
            RuntimeError: they do not all run at once.
        """
        # A request that compresses, or the step that the scheduler is ahead, takes a few more.
        command = {**command, "output_tokens": 4 * command["profile_steps"] + 32}
        self._add(command)
        while not self._all_decode(command["requests"]):
            if not self._engine.has_unfinished_requests():
                raise RuntimeError(f"{command['requests']} requests do not fit together")
            self._engine.step()
        for _ in range(8):
            self._engine.step()
        figures = profile_steps(self._engine.step, command["profile_steps"])
        while self._engine.has_unfinished_requests():
            self._engine.step()
        return figures

    def _all_decode(self, requests: int) -> bool:
        running = self._scheduler.running
        return len(running) == requests and all(request.num_output_tokens for request in running)

    def _compression(self) -> Compression:
        if not self._compresses:
            return Compression()
        timings: dict[str, Any] = self._engine.collective_rpc("adakv_timings")[0]
        return Compression(
            timings["compress_s"], timings["evict_s"], timings["plan_s"], timings["extra_bytes"]
        )

    def _add(self, command: dict[str, Any]) -> list[str]:
        """Add the requests of a command; return their names."""
        bound = command.get("decode_budget_tokens")
        params = SamplingParams(
            temperature=0, max_tokens=command["output_tokens"], ignore_eos=True, detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            extra_args={"adakv_decode_budget_tokens": bound} if bound else None,
        )  # fmt: skip
        make = self._text_prompts if self._text else self._random_prompts
        prompts = make(command["requests"], command["prompt_tokens"], command["seed"])
        named = {f"{command['seed']}-{number}": ids for number, ids in enumerate(prompts)}
        for name, ids in named.items():
            self._engine.add_request(name, {"prompt_token_ids": ids}, params)
        return list(named)

    def _random_prompts(self, count: int, length: int, seed: int) -> list[list[int]]:
        rng = random.Random(seed)
        vocabulary = self._engine.model_config.get_vocab_size()
        return [[rng.randrange(vocabulary) for _ in range(length)] for _ in range(count)]

    def _text_prompts(self, count: int, length: int, seed: int) -> list[list[int]]:
        """Return distinct stretches of the Python manual, `length` tokens each."""
        text = "\n".join(topics.topics[name] for name in sorted(topics.topics))
        tokenizer: Any = self._engine.get_tokenizer()
        stretch = 8 * length
        prompts = []
        for number in range(count):
            start = ((seed + 1) * 97 + number * 31) * 1009 % (len(text) - stretch)
            ids = tokenizer.encode(f"{seed}.{number} " + text[start : start + stretch])
            prompts.append(ids[:length])
        return prompts


def main() -> None:
    engine = Engine(json.loads(sys.argv[1]))
    for line in sys.stdin:
        command = json.loads(line)
        answer = engine.round
        if "profile_steps" in command:
            answer = engine.profile
        elif "profile_prompts" in command:
            answer = engine.profile_prompts
        print(json.dumps(answer(command)), flush=True)


if __name__ == "__main__":
    main()
