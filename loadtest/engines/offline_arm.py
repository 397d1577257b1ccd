"""One arm of `loadtest.offline`: an engine in this process that answers one round per line."""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pydoc_data import topics
from typing import Any

from adakv_worker.plugin import engine_args

# A plug-in of vLLM, loaded in every process; imported for its settings' names and to time it.
from adakv_worker.worker.compression import Compression
from adakv_worker.worker.eviction import Eviction
from serving.models.embedded import embedded_model_path


@dataclass
class StepTimes:
    """What one round's engine steps took, in seconds."""

    steps: list[tuple[float, int, int]] = field(default_factory=list)  # seconds, prefill, decode
    compress_s: float = 0.0
    evict_s: float = 0.0
    prepare_s: float = 0.0
    preemptions: int = 0
    peak_running: int = 0
    held: list[float] = field(default_factory=list)  # blocks for each running request
    extra_bytes: int = 0

    def figures(self, elapsed: float, output_tokens: int) -> dict[str, Any]:
        pure = [(seconds, decode) for seconds, prefill, decode in self.steps if prefill == 0]
        decode_s = sum(seconds for seconds, _ in pure)
        decoded = sum(decode for _, decode in pure)
        per_token = decode_s / max(decoded, 1)
        # Decodes that rode along in prefill steps, at what they cost alone.
        riding = sum(decode for _, prefill, decode in self.steps if prefill) * per_token
        mixed_s = sum(seconds for seconds, prefill, _ in self.steps if prefill)
        prefill_s = max(mixed_s - riding - self.compress_s, 1e-9)
        peak = max((decode for _, decode in pure), default=0)
        at_peak = [(seconds, decode) for seconds, decode in pure if decode == peak]
        return {
            "tokens_per_s": output_tokens / elapsed,
            "output_tokens": output_tokens,
            "elapsed_s": elapsed,
            "peak_running": self.peak_running,
            "blocks_per_request": sum(self.held) / max(len(self.held), 1),
            "preemptions": self.preemptions,
            "prefill_s": prefill_s,
            "compress_s": self.compress_s,
            "evict_s": self.evict_s,
            "decode_s": decode_s + riding,
            "decode_tokens_per_s": peak * len(at_peak) / max(sum(s for s, _ in at_peak), 1e-9),
            "compress_share": self.compress_s / prefill_s,
            "prepare_share": self.prepare_s / max(decode_s, 1e-9),
            "extra_bytes": self.extra_bytes,
        }


class Engine:
    def __init__(self, settings: dict[str, Any]) -> None:
        from vllm import LLM

        compression = settings["compression"]
        self._llm = LLM(
            model=str(embedded_model_path()),
            dtype="float32",
            max_model_len=3072,
            block_size=32,
            kv_cache_memory_bytes=settings["kv_bytes"],
            enforce_eager=True,
            max_num_batched_tokens=2048,
            max_num_seqs=16,
            enable_prefix_caching=True,
            **(engine_args(compression) if compression is not None else {}),
        )
        self._times = StepTimes()
        self._watch()

    def _watch(self) -> None:
        """Times the engine's own calls; the engine is this process's, stock or not."""
        core: Any = self._llm.llm_engine.engine_core
        core = core.engine_core
        self._scheduler = core.scheduler
        self._runner = core.model_executor.driver_worker.worker.model_runner
        executor = core.model_executor
        executor.execute_model = self._timed_step(executor.execute_model)
        executor.sample_tokens = self._timed_sampling(executor.sample_tokens)
        preempt = self._scheduler._preempt_request

        def counted(*args: Any, **kwargs: Any) -> Any:
            self._times.preemptions += 1
            return preempt(*args, **kwargs)

        self._scheduler._preempt_request = counted
        if state := getattr(self._runner, "adakv", None):
            state.compress = self._timed(state.compress, "compress_s")
            state.finish_compressions = self._timed(state.finish_compressions, "compress_s")
            state.evict = self._timed(state.evict, "evict_s")
            state.finish_evictions = self._timed(state.finish_evictions, "evict_s")
            watched: Any = Compression
            watched.see = self._timed(Compression.see, "compress_s")
            watched = Eviction
            watched.see = self._timed(Eviction.see, "evict_s")
            self._runner._plan_step = self._timed(self._runner._plan_step, "prepare_s")

    def _timed(self, call: Callable, name: str) -> Callable:
        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                spent = time.perf_counter() - started
                held = self._runner.adakv.extra_bytes
                self._times.extra_bytes = max(self._times.extra_bytes, held)
                # Preparation is a share of pure decode steps, so only theirs counts.
                if name != "prepare_s" or self._decoding:
                    setattr(self._times, name, getattr(self._times, name) + spent)

        return timed

    def _timed_step(self, call: Callable) -> Callable:
        def timed(output: Any, *args: Any, **kwargs: Any) -> Any:
            counts = output.num_scheduled_tokens.values()
            prefill = sum(count for count in counts if count > 1)
            decode = sum(1 for count in counts if count == 1)
            self._decoding = prefill == 0
            started = time.perf_counter()
            result = call(output, *args, **kwargs)
            self._times.steps.append((time.perf_counter() - started, prefill, decode))
            self._note_memory(decode if prefill == 0 else 0)
            return result

        return timed

    def _timed_sampling(self, call: Callable) -> Callable:
        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            result = call(*args, **kwargs)
            seconds, prefill, decode = self._times.steps[-1]
            spent = time.perf_counter() - started
            self._times.steps[-1] = (seconds + spent, prefill, decode)
            return result

        return timed

    def _note_memory(self, decoding: int) -> None:
        running = len(self._scheduler.running)
        self._times.peak_running = max(self._times.peak_running, running)
        pool = self._scheduler.kv_cache_manager.block_pool
        if decoding:
            used = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()
            self._times.held.append(used / running)

    def round(self, command: dict[str, Any]) -> dict[str, Any]:
        from vllm import SamplingParams

        prompts = self._prompts(command["requests"], command["prompt_tokens"], command["seed"])
        bound = command["decode_budget_tokens"]
        params = SamplingParams(
            temperature=0,
            max_tokens=command["output_tokens"],
            ignore_eos=True,
            detokenize=False,
            extra_args={"adakv_decode_budget_tokens": bound} if bound else None,
        )
        self._times = StepTimes()
        started = time.perf_counter()
        outputs = self._llm.generate(prompts, params, use_tqdm=False)
        elapsed = time.perf_counter() - started
        return self._times.figures(
            elapsed, sum(len(output.outputs[0].token_ids) for output in outputs)
        )

    def _prompts(self, count: int, length: int, seed: int) -> list[Any]:
        """Distinct stretches of the Python manual, `length` tokens each."""
        text = "\n".join(topics.topics[name] for name in sorted(topics.topics))
        tokenizer = self._llm.get_tokenizer()
        stretch = 8 * length
        prompts = []
        for number in range(count):
            start = ((seed + 1) * 97 + number * 31) * 1009 % (len(text) - stretch)
            ids = tokenizer.encode(f"{seed}.{number} " + text[start : start + stretch])
            prompts.append({"prompt_token_ids": ids[:length]})
        return prompts


def main() -> None:
    engine = Engine(json.loads(sys.argv[1]))
    for line in sys.stdin:
        print(json.dumps(engine.round(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
