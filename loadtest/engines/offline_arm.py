"""One arm of `loadtest.offline`: an engine in this process that answers one round per line."""

import json
import sys
import time
from pydoc_data import topics
from typing import Any, NamedTuple

from adakv_worker.plugin import engine_args
from serving.models.embedded import embedded_model_path


class Held(NamedTuple):
    """Running requests and the blocks that they hold, after a step."""

    running: int
    blocks: int


def step_figures(timings: dict[str, Any], held: list[Held]) -> dict[str, Any]:
    """Return the figures of one round from the worker's timings and the memory at each step."""
    steps = timings["steps"]
    pure = [(seconds, decode) for seconds, prefill, decode, _ in steps if prefill == 0]
    decode_s = sum(seconds for seconds, _ in pure)
    decoded = sum(decode for _, decode in pure)
    per_token = decode_s / max(decoded, 1)
    # Decodes that rode along in prefill steps, at what they cost alone.
    riding = sum(decode for _, prefill, decode, _ in steps if prefill) * per_token
    mixed_s = sum(seconds for seconds, prefill, _, _ in steps if prefill)
    compress_s = timings["compress_s"]
    prefill_s = max(mixed_s - riding - compress_s, 1e-9)
    peak = max((decode for _, decode in pure), default=0)
    at_peak = [(seconds, decode) for seconds, decode in pure if decode == peak]
    each = [
        now.blocks / now.running
        for now, (_, prefill, decode, _) in zip(held, steps, strict=False)
        if prefill == 0 and decode and now.running
    ]
    return {
        "peak_running": max((now.running for now in held), default=0),
        "blocks_per_request": sum(each) / max(len(each), 1),
        "preemptions": sum(preempted for *_, preempted in steps),
        "prefill_s": prefill_s,
        "compress_s": compress_s,
        "evict_s": timings["evict_s"],
        "decode_s": decode_s + riding,
        "decode_tokens_per_s": peak * len(at_peak) / max(sum(s for s, _ in at_peak), 1e-9),
        "compress_share": compress_s / prefill_s,
        "prepare_share": timings["plan_s"] / max(decode_s, 1e-9),
        "extra_bytes": timings["extra_bytes"],
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
            # The stock arm has our worker, too, which measures its steps.
            **(
                engine_args(compression)
                if compression is not None
                else {"worker_cls": "adakv_worker.cpu_worker.AdaKVCPUWorker"}
            ),
        )
        core: Any = self._llm.llm_engine.engine_core
        self._scheduler = core.engine_core.scheduler

    def round(self, command: dict[str, Any]) -> dict[str, Any]:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        prompts = self._prompts(command["requests"], command["prompt_tokens"], command["seed"])
        bound = command["decode_budget_tokens"]
        params = SamplingParams(
            temperature=0,
            max_tokens=command["output_tokens"],
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            extra_args={"adakv_decode_budget_tokens": bound} if bound else None,
        )
        engine, held, output_tokens = self._llm.llm_engine, [], 0
        self._llm.collective_rpc("adakv_start_timings")
        started = time.perf_counter()
        for number, prompt in enumerate(prompts):
            engine.add_request(f"{command['seed']}-{number}", prompt, params)
        while engine.has_unfinished_requests():
            finished: list[Any] = engine.step()
            output_tokens += sum(len(output.outputs[0].token_ids) for output in finished)
            held.append(self._held())
        elapsed = time.perf_counter() - started
        (timings,) = self._llm.collective_rpc("adakv_timings")
        return {
            "tokens_per_s": output_tokens / elapsed,
            "output_tokens": output_tokens,
            "elapsed_s": elapsed,
            **step_figures(timings, held),
        }

    def _held(self) -> Held:
        pool = self._scheduler.kv_cache_manager.block_pool
        used = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()
        return Held(len(self._scheduler.running), used)

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
