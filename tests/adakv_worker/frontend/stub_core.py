"""A front end over a scripted engine core, without an engine."""

import asyncio
from collections.abc import Callable
from typing import Any

from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest
from vllm.v1.engine.exceptions import EngineDeadError

from adakv_worker.frontend.moving import MovingCore
from adakv_worker.frontend.sampling_limits import check_sizes
from adakv_worker.frontend.sent_requests import BookedCore, SentRequests
from adakv_worker.messages import Proof, with_proof
from tests.adakv_worker.proofs import make_proof

PROOF = make_proof(policy="snapkv")


class Core:
    """A client of an engine core whose answers the test sets."""

    def __init__(self) -> None:
        # As vLLM's client does once it has seen that the core is gone.
        self.refuses = False
        self.outputs: asyncio.Queue[EngineCoreOutputs | BaseException] = asyncio.Queue()
        self.on_add: Callable[[EngineCoreRequest], None] = lambda request: None
        self.aborted: list[str] = []
        # The workers' answer to every call; with None they never answer.
        self.answer: list[Any] | None = None
        self.called = asyncio.Event()

    async def add_request_async(self, request: EngineCoreRequest) -> None:
        self.on_add(request)

    async def abort_requests_async(self, request_ids: list[str]) -> None:
        self.aborted += request_ids

    async def get_output_async(self) -> EngineCoreOutputs:
        outputs = await self.outputs.get()
        if isinstance(outputs, BaseException):
            raise outputs
        return outputs

    async def collective_rpc_async(self, *_: Any) -> list[Any]:
        if self.refuses:
            raise EngineDeadError
        self.called.set()
        if self.answer is None:
            await asyncio.Event().wait()
        assert self.answer is not None
        return self.answer

    def shutdown(self) -> None:
        pass


class Front:
    """A front end whose requests have one token of their answers."""

    def __init__(self) -> None:
        self.core = Core()
        self.sent = SentRequests()
        self.moving = MovingCore(BookedCore(self.core, self.sent, check_sizes))

    async def asks(
        self, name: str = "asked", proof: Proof | None = PROOF, **changes: Any
    ) -> EngineCoreRequest:
        asked = request(name, **changes)
        await self.moving.add_request_async(asked)
        self.decodes(name, proof)
        await self.moving.get_output_async()
        return asked

    def decodes(self, name: str, proof: Proof | None = PROOF) -> None:
        params = with_proof(proof) if proof is not None else None
        output = EngineCoreOutput(name, [7], kv_transfer_params=params)
        self.core.outputs.put_nowait(EngineCoreOutputs(outputs=[output]))

    def dies(self, error: BaseException | None = None) -> None:
        self.core.outputs.put_nowait(error or RuntimeError("dead"))


def request(name: str, **changes: Any) -> EngineCoreRequest:
    fields: dict[str, Any] = {
        "prompt_token_ids": [5, 6], "mm_features": None,
        "sampling_params": SamplingParams(max_tokens=9), "pooling_params": None,
        "arrival_time": 0.0, "lora_request": None, "cache_salt": None, "data_parallel_rank": None,
    }  # fmt: skip
    return EngineCoreRequest(name, **fields | changes)
