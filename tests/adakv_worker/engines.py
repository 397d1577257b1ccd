"""Real engines in this process, and a Hugging Face forward pass with the same entries kept."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from adakv_worker.core.checks import check_blocks
from adakv_worker.frontend.validator import bound_by
from adakv_worker.plugin import engine_args

VOCABULARY = 320


def make_tiny_model(
    folder: Path,
    heads: int,
    kv_heads: int,
    layers: int = 4,
    head_dim: int = 32,
    initializer_range: float = 0.15,
) -> Path:
    """Save a random Llama, by default with sharp enough logits to tell tokens apart."""
    torch.manual_seed(heads * 100 + kv_heads)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32 * heads, intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim,
        max_position_embeddings=4096, initializer_range=initializer_range,
        tie_word_embeddings=False, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).float().save_pretrained(folder)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "torch_dtype": "float32"}))
    return folder


def prompt(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()


class Result(NamedTuple):
    """One finished request. `kept` [L, H, n] bool, or None without a compression."""

    prompt: list[int]
    tokens: list[int]
    logprobs: list[dict[int, float]]
    proof: dict[str, Any] | None
    kept: torch.Tensor | None
    finish_reason: str | None


class Engine:
    """An `LLM` whose scheduler and worker live in this process."""

    def __init__(self, model: Path, compression: dict[str, Any] | None, **options: Any) -> None:
        from vllm import LLM

        settings: dict[str, Any] = {
            "dtype": "float32", "max_model_len": 2048, "block_size": 32, "enforce_eager": True,
            "kv_cache_memory_bytes": 64 << 20, "max_num_batched_tokens": 512, "max_num_seqs": 16,
            "skip_tokenizer_init": True, "enable_prefix_caching": True, "max_logprobs": 20,
            "disable_log_stats": True, "seed": 0,
        }  # fmt: skip
        if compression is not None:
            debug = {"check_invariants": True, "record_selections": True, "min_budget_tokens": 1}
            settings |= engine_args({**debug, **compression})
        # Bounds belong to the process: drop those of its last engine.
        bound_by(None)
        self.llm = LLM(model=str(model), **{**settings, **options})
        core: Any = self.llm.llm_engine.engine_core
        self.scheduler = core.engine_core.scheduler
        self.runner = core.engine_core.model_executor.driver_worker.worker.model_runner
        self.preemptions = 0
        self._kept: dict[str, torch.Tensor] = {}
        self._watch()

    def _watch(self) -> None:
        preempt = self.scheduler._preempt_request

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.preemptions += 1
            return preempt(*args, **kwargs)

        self.scheduler._preempt_request = counted
        if work := getattr(self.runner, "adakv", None):
            state = work.state
            forget, hold = state.forget, state.hold

            def remember(request_id: str) -> None:
                if request_id in state.selections:
                    self._kept[request_id.rpartition("-")[0]] = state.selections[request_id]

            def forgotten(request_id: str) -> None:
                remember(request_id)
                forget(request_id)

            def held(request_id: str, name: str) -> None:
                remember(request_id)
                hold(request_id, name)

            state.forget, state.hold = forgotten, held

    @property
    def free_blocks(self) -> int:
        return self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()

    @property
    def manager(self) -> Any:
        return self.scheduler.kv_cache_manager.coordinator.single_type_managers[0]

    def params(self, max_tokens: int = 12, **options: Any) -> Any:
        from vllm import SamplingParams

        settings = {"temperature": 0.0, "logprobs": 5, "ignore_eos": True, "detokenize": False}
        return SamplingParams(max_tokens=max_tokens, **{**settings, **options})

    def run(
        self, prompts: list[list[int]], params: Any = None, lora_request: Any = None
    ) -> list[Result]:
        outputs = self.llm.generate(
            [{"prompt_token_ids": ids} for ids in prompts],
            params if params is not None else self.params(),
            use_tqdm=False,
            lora_request=lora_request,
        )
        # The next step forgets finished requests: this takes an empty one.
        self.flush()
        return [self._result(output) for output in outputs]

    def run_one_by_one(self, prompts: list[list[int]], params: Any, steps: int) -> list[Result]:
        """Answer prompts of which each begins some steps after the one before."""
        core, done = self.llm.llm_engine, {}
        waiting = [(f"staggered-{number}", ids) for number, ids in enumerate(prompts)]
        names = [name for name, _ in waiting]
        taken = 0
        while waiting or core.has_unfinished_requests():
            if waiting and taken % steps == 0:
                name, ids = waiting.pop(0)
                core.add_request(name, {"prompt_token_ids": ids}, params)
            taken += 1
            done |= {output.request_id: output for output in core.step() if output.finished}
        self.flush()
        return [self._result(done[name]) for name in names]

    def flush(self) -> None:
        """Let the worker forget the finished requests, which it does in a step."""
        while self.scheduler.has_finished_requests():
            self.llm.llm_engine.engine_core.get_output()

    def _result(self, output: Any) -> Result:
        answer = output.outputs[0]
        proof = (output.kv_transfer_params or {}).get("kv_compression")
        return Result(
            list(output.prompt_token_ids),
            list(answer.token_ids),
            [{t: entry.logprob for t, entry in step.items()} for step in answer.logprobs or []],
            proof,
            self._kept.pop(output.request_id, None),
            answer.finish_reason,
        )

    def assert_nothing_leaked(self) -> None:
        pool = self.scheduler.kv_cache_manager.block_pool
        assert self.free_blocks == pool.num_gpu_blocks - 1
        if hasattr(self.runner, "adakv"):
            check_blocks(self.manager)
            assert not self.manager.requests
            assert not self.scheduler._proofs
            assert not self.scheduler._to_take_up
            assert not self.runner.adakv.moves.staged
            assert not self.runner.adakv.state._rows
            held = self.manager.held
            assert set(self.runner.adakv.state.held.cards) == {one.name for one in held or ()}
            assert not len(self.runner.adakv.state.windows)

    def close(self) -> None:
        """End the process groups, which all engines of a process share: one engine at a time."""
        self.llm.llm_engine.engine_core.shutdown()


class Reference:
    """A Hugging Face model that attends to the kept entries of a prompt, per layer and head."""

    def __init__(self, model: Path, attention: str = "eager") -> None:
        self.model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.float32, attn_implementation=attention
        ).eval()
        self._masks: list[torch.Tensor] = []
        attentions = (m for m in self.model.modules() if type(m).__name__.endswith("Attention"))
        for index, attention in enumerate(attentions):
            attention.register_forward_pre_hook(self._hook(index), with_kwargs=True)

    def _hook(self, index: int) -> Any:
        def use_mask(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            return args, {**kwargs, "attention_mask": self._masks[index]}

        return use_mask

    @torch.inference_mode()
    def seeing(self, tokens: list[int], seen: torch.Tensor) -> torch.Tensor:
        """Return log-probabilities [n, V] where token i attends as seen[:, :, i] [L, H, n] says."""
        config = self.model.config
        heads = config.num_attention_heads
        group = heads // (getattr(config, "num_key_value_heads", None) or heads)
        self._masks = [
            torch.zeros(1).masked_fill(~layer.repeat_interleave(group, dim=0), float("-inf"))[None]
            for layer in seen
        ]
        logits = self.model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
        return logits.log_softmax(dim=-1)

    @torch.inference_mode()
    def logprobs(
        self, result: Result, kept_at: Sequence[torch.Tensor | None] | None = None
    ) -> torch.Tensor:
        """Return log-probabilities [len(tokens), V] of the steps that made `result.tokens`.

        Args:
            kept_at: for each token the entries of its step among the first m, [L, H, m] bool, None
                for all; without it `result.kept` counts for all steps after the first.
        """
        ids = torch.tensor([[*result.prompt, *result.tokens[:-1]]])
        n, total = len(result.prompt), ids.shape[1]
        causal = torch.ones((total, total), dtype=torch.bool).tril()
        config = self.model.config
        layers, heads = config.num_hidden_layers, config.num_attention_heads
        group = heads // (getattr(config, "num_key_value_heads", None) or heads)
        self._masks = []
        for layer in range(layers):
            seen = causal.expand(heads, -1, -1).clone()
            for step in range(1, len(result.tokens)):
                # Steps after the first attend to the kept entries and all later ones.
                kept = result.kept if kept_at is None else kept_at[step]
                if kept is not None:
                    heads_kept = kept[layer].repeat_interleave(group, dim=0)
                    seen[:, n + step - 1, : kept.shape[-1]] &= heads_kept
            self._masks.append(torch.zeros(seen.shape).masked_fill_(~seen, float("-inf"))[None])
        logits = self.model(input_ids=ids, use_cache=False).logits[0]
        return logits[n - 1 :].log_softmax(dim=-1)


def assert_equals_reference(
    result: Result,
    reference: Reference,
    tolerance: float,
    kept_at: Sequence[torch.Tensor | None] | None = None,
) -> None:
    expected = reference.logprobs(result, kept_at)
    for step, (token, logprobs) in enumerate(zip(result.tokens, result.logprobs, strict=True)):
        for candidate, logprob in logprobs.items():
            difference = abs(logprob - float(expected[step, candidate]))
            assert difference < tolerance, f"step {step}: off by {difference}"
        best = expected[step].max()
        assert float(best - expected[step, token]) < tolerance, f"step {step}: another token"
