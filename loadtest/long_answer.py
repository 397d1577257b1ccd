"""`python -m loadtest.long_answer`: a long answer with and without evictions while it is written.

Prints blocks held over time, tokens per second, and the texts.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

_QUESTION = (
    "Write a very long and detailed story about a sailor who finds an island that is on no map. "
    "Tell of every day that he spends there."
)
_POINTS = 16


class Written(NamedTuple):
    """held_blocks: at equal distances, from the first token to the last."""

    tokens: int
    tokens_per_s: float
    held_blocks: list[int]
    evictions: int
    text: str

    def report(self, arm: str) -> str:
        return (
            f"{arm}: {self.tokens} tokens, {self.tokens_per_s} tokens/s, "
            f"{self.evictions} evictions, blocks held {self.held_blocks}\n{self.text}\n"
        )


def arms(policy: str | None, decode_budget: int) -> dict[str, dict[str, Any]]:
    """Return the request options of both arms."""
    chosen = {"adakv_policy": policy} if policy else {}
    return {
        "unbounded": {"adakv_policy": "full"},
        "bounded": {**chosen, "adakv_decode_budget_tokens": decode_budget},
    }


def write(llm: Any, prompt: list[int], tokens: int, options: dict[str, Any]) -> Written:
    """Write one answer of `tokens` tokens, greedily."""
    from vllm import SamplingParams

    pool = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, extra_args=options)
    free = pool.get_num_free_blocks()
    llm.llm_engine.add_request("answer", {"prompt_token_ids": prompt}, params)
    held: list[int] = []
    outputs: list[Any] = []
    started = time.perf_counter()
    while llm.llm_engine.has_unfinished_requests():
        outputs = llm.llm_engine.step() or outputs
        held.append(free - pool.get_num_free_blocks())
    elapsed = time.perf_counter() - started
    (answer,) = outputs[-1].outputs
    proof = outputs[-1].kv_transfer_params["kv_compression"]
    return Written(
        len(answer.token_ids),
        round(tokens / elapsed, 2),
        # The first step is the prompt's; the last one frees the blocks.
        at_equal_distances(held[1:-1]),
        proof["decode_evictions"],
        answer.text,
    )


def at_equal_distances(held: Sequence[int]) -> list[int]:
    """Return some of the values, `_POINTS` to twice as many where there are enough."""
    return list(held[:: max(1, len(held) // _POINTS)])


def _embedded_llm(max_model_len: int) -> Any:
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    from vllm import LLM

    from adakv_serve.serving.models.embedded import embedded_model_path
    from adakv_worker.plugin import engine_args

    return LLM(
        model=str(embedded_model_path()), dtype="float32", max_model_len=max_model_len,
        block_size=32, kv_cache_memory_bytes=1 << 30, enforce_eager=True, **engine_args({}),
    )  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtest.long_answer", description=__doc__)
    parser.add_argument("--tokens", type=int, default=4000)
    parser.add_argument("--decode-budget", type=int, default=512)
    parser.add_argument("--policy", default=None, help="without it the default")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args(argv)
    llm = _embedded_llm(args.tokens + 512)
    prompt = llm.get_tokenizer().apply_chat_template(
        [{"role": "user", "content": _QUESTION}], add_generation_prompt=True, return_dict=False
    )
    figures = {}
    for name, options in arms(args.policy, args.decode_budget).items():
        written = write(llm, prompt, args.tokens, options)
        figures[name] = written._asdict()
        print(written.report(name), flush=True)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
