"""One arm of `loadtest.published`: an engine in this process that answers one round per line."""

import json
import random
import sys
import time
from typing import Any, NamedTuple


class Step(NamedTuple):
    """What one engine step brought. pure: it was of decodes alone, and so was the one before."""

    seconds: float
    tokens: int
    pure: bool


class Engine:
    def __init__(self, settings: dict[str, Any]) -> None:
        from vllm import LLM

        arguments = dict(settings["engine"])
        if settings["compression"] is not None:
            from adakv_worker.plugin import engine_args

            arguments |= engine_args(settings["compression"])
        self._llm = LLM(model=settings["model"], **arguments)
        core: Any = self._llm.llm_engine.engine_core
        core = core.engine_core
        self._scheduler = core.scheduler
        runner = core.model_executor.driver_worker.worker.model_runner
        self._state = runner.adakv.state if settings["compression"] is not None else None
        self._preemptions = 0
        # Prompt tokens in the last two steps that were scheduled: where steps are scheduled ahead,
        # the outputs at hand are those of the one before.
        self._prefills = [0, 0]
        self._watch()

    def _watch(self) -> None:
        schedule, preempt = self._scheduler.schedule, self._scheduler._preempt_request

        def watched(*args: Any, **kwargs: Any) -> Any:
            output = schedule(*args, **kwargs)
            prefill = sum(count for count in output.num_scheduled_tokens.values() if count > 1)
            self._prefills = [self._prefills[1], prefill]
            return output

        def counted(*args: Any, **kwargs: Any) -> Any:
            self._preemptions += 1
            return preempt(*args, **kwargs)

        self._scheduler.schedule, self._scheduler._preempt_request = watched, counted

    def round(self, command: dict[str, Any]) -> dict[str, Any]:
        self._add(command)
        self._preemptions = 0
        steps, running, beside = [], 0, 0
        pool = self._scheduler.kv_cache_manager.block_pool
        engine = self._llm.llm_engine
        started = last = time.perf_counter()
        while engine.has_unfinished_requests():
            outputs: Any = engine.step()
            now = time.perf_counter()
            tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
            steps.append(Step(now - last, tokens, not any(self._prefills)))
            last = now
            running = max(running, len(self._scheduler.running))
            if self._state is not None:
                beside = max(beside, self._state.extra_bytes)
        elapsed, total = last - started, sum(step.tokens for step in steps)
        return {
            "elapsed_s": elapsed,
            "output_tokens": total,
            "tokens_per_s": total / elapsed,
            "decode_tokens_per_s": _at_its_peak(steps),
            "peak_running": running,
            "blocks": pool.num_gpu_blocks - 1,
            "preemptions": self._preemptions,
            "beside_bytes": beside,
        }

    def _add(self, command: dict[str, Any]) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            temperature=0, max_tokens=command["output_tokens"], ignore_eos=True, detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )  # fmt: skip
        rng = random.Random(command["seed"])
        vocabulary = self._llm.llm_engine.model_config.get_vocab_size()
        for number in range(command["requests"]):
            ids = [rng.randrange(vocabulary) for _ in range(command["prompt_tokens"])]
            name = f"{command['seed']}-{number}"
            self._llm.llm_engine.add_request(name, {"prompt_token_ids": ids}, params)


def _at_its_peak(steps: list[Step]) -> float:
    """Tokens per second of steps of decodes alone, of the largest batches."""
    pure = [step for step in steps if step.pure]
    most = max((step.tokens for step in pure), default=0)
    largest = [step for step in pure if step.tokens >= 0.95 * most]
    return sum(step.tokens for step in largest) / max(1e-9, sum(step.seconds for step in largest))


def main() -> None:
    engine = Engine(json.loads(sys.argv[1]))
    for line in sys.stdin:
        print(json.dumps(engine.round(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
