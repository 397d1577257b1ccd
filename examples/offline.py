"""Ask about a long text offline, with the whole KV cache and with a compressed one.

Usage: python examples/offline.py [MODEL], a local folder or a hub id. Without it the embedded
SmolLM2-135M-Instruct answers.
"""

import sys

from vllm import LLM, SamplingParams

from adakv_serve.serving.models.embedded import embedded_model_path
from adakv_worker.plugin import engine_args

TEXT = "The lighthouse keeper wrote down the name of every ship that passed the cape. " * 100
QUESTION = "What did the lighthouse keeper write down?"


def main() -> None:
    llm = LLM(
        model=sys.argv[1] if len(sys.argv) > 1 else str(embedded_model_path()),
        max_model_len=4096,
        kv_cache_memory_bytes=512 << 20,
        enforce_eager=True,
        # The engine's defaults; each request may override them.
        **engine_args({"policy": "auto", "keep_ratio": 0.5, "budget_tokens": 256}),
    )
    messages = [{"role": "user", "content": f"{TEXT}\n\n{QUESTION}"}]
    for options in ({"adakv_policy": "full"}, {}, {"adakv_budget_tokens": 128}):
        sampling = SamplingParams(temperature=0, max_tokens=40, extra_args=options)
        (answer,) = llm.chat(messages, sampling, use_tqdm=False)
        proof = answer.kv_transfer_params["kv_compression"]
        print(f"\n{options or 'default settings'}: {answer.outputs[0].text.strip()}")
        print(
            f"  {proof['policy']}: {proof['kept_mean']:.0f} of {proof['original_tokens']} entries "
            f"per head, {proof['blocks_after']} of {proof['blocks_before']} blocks, "
            f"skipped: {proof['skipped']}"
        )


if __name__ == "__main__":
    main()
