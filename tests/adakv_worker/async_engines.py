"""Engines in processes of their own, with their front ends and clients in this process."""

import asyncio
from pathlib import Path
from typing import Any

from adakv_worker.frontend.moving import MovableLLM, MovingCore
from adakv_worker.frontend.sent_requests import BookedLLM
from adakv_worker.plugin import engine_args
from tests.adakv_worker.engines import prompt


class Side:
    """One engine and its clients."""

    def __init__(
        self,
        model: Path,
        *,
        compressing: bool = True,
        sessions: dict[str, Any] | None = None,
        loggers: list[Any] | None = None,
        **options: Any,
    ) -> None:
        """
        Args:
            compressing: requests can be moved, too; False makes an engine of stock scheduling.
            sessions: settings of sessions; None for none.
            loggers: factories of vLLM's stat loggers.
        """
        from vllm.engine.arg_utils import AsyncEngineArgs

        compression = engine_args({
            "budget_tokens": 48, "keep_ratio": 0, "window_tokens": 16, "check_invariants": True,
            "sessions": sessions or {},
        })  # fmt: skip
        args = AsyncEngineArgs(
            model=str(model), dtype="float32", max_model_len=2048, block_size=32,
            enforce_eager=True, kv_cache_memory_bytes=32 << 20, max_num_batched_tokens=512,
            max_num_seqs=8, skip_tokenizer_init=True,
            **(compression if compressing else {}),
            **options,
        )  # fmt: skip
        llm = (MovableLLM if compressing else BookedLLM).from_vllm_config(
            args.create_engine_config(), stat_loggers=loggers
        )
        assert isinstance(llm, BookedLLM)
        self.llm = llm

    @property
    def core(self) -> MovingCore:
        assert isinstance(self.llm.engine_core, MovingCore)
        return self.llm.engine_core

    def ask(self, text: int, length: int = 300, **options: Any) -> "Client":
        return Client(self, prompt(length, text), options)


class Client:
    """A client with one request; `tokens` are those of all choices."""

    _count = 0

    def __init__(self, side: Side, ids: list[int], options: dict[str, Any]) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        settings = {
            "temperature": 0.0, "max_tokens": 60, "ignore_eos": True, "detokenize": False,
            "logprobs": 2, "output_kind": RequestOutputKind.DELTA,
        }  # fmt: skip
        Client._count += 1
        self.ids = ids
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.finish_reason: str | None = None
        self.proof: dict[str, Any] | None = None
        self._more = asyncio.Condition()
        self._ended = False
        self.task = asyncio.create_task(
            self._listen(side, f"client-{Client._count}", SamplingParams(**settings | options))
        )
        self.name = f"client-{Client._count}"

    async def _listen(self, side: Side, name: str, params: Any) -> None:
        try:
            await self._take_outputs(side, name, params)
        finally:
            async with self._more:
                self._ended = True
                self._more.notify_all()

    async def _take_outputs(self, side: Side, name: str, params: Any) -> None:
        async for output in side.llm.generate({"prompt_token_ids": self.ids}, params, name):
            (choice,) = output.outputs
            async with self._more:
                self.tokens += choice.token_ids
                self.logprobs += [
                    step[token].logprob
                    for step, token in zip(choice.logprobs or [], choice.token_ids, strict=False)
                ]
                self.finish_reason = choice.finish_reason
                self.proof = (output.kv_transfer_params or {}).get("kv_compression", self.proof)
                self._more.notify_all()

    async def has(self, tokens: int) -> None:
        async with self._more:
            await self._more.wait_for(lambda: len(self.tokens) >= tokens or self._ended)


async def idle(side: Side) -> bool:
    """Return whether the engine holds nothing, or will not before long."""
    core = side.core
    for _ in range(1200):
        if not core.guests and not core.away and not side.llm.output_processor.request_states:
            return True
        # vLLM signals no end of its own bookkeeping.
        await asyncio.sleep(0.05)
    return False


async def undisturbed(side: Side, client: Client, **options: Any) -> Client:
    """Send the same request again."""
    again = Client(side, client.ids, options)
    await again.task
    return again


def inside(side: Side, client: Client) -> str:
    """Return the front end's id of a client's request."""
    (name,) = (one for one in side.llm.output_processor.request_states if client.name in one)
    return name
