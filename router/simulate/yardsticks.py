"""Selections of other projects, as yardsticks: NVIDIA Dynamo's own, and a cost after llm-d's."""

import asyncio
import os
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from adakv_serve.router.affinity import PrefixAffinity
from adakv_serve.router.simulate.replica import SimulatedReplica
from adakv_serve.router.simulate.traces import BLOCK_SIZE_TOKENS, Request

# Tokens of an engine's step, vLLM's default for serving.
_BATCHED_TOKENS = 2048
_MODEL = {"model_name": "simulated", "tenant_id": "simulated"}


class LlmD:
    """A sum of weighted scores, each within 0 and 1, after the default profile of llm-d's docs.

    Queue length 2, free KV memory 2, share of the prompt that is probably cached 3. The prefixes
    are those that it has sent where, as with llm-d's default index.
    """

    def __init__(
        self, fleet: Sequence[SimulatedReplica], rng: random.Random, blocks_total: int
    ) -> None:
        self._fleet, self._rng, self._blocks_total = fleet, rng, blocks_total
        self._prefixes = PrefixAffinity()
        # By replica: requests in its queue, and free blocks.
        self._seen: dict[int, tuple[int, int]] = {}
        for index in range(len(fleet)):
            self.report(index, 0.0)

    def choose(self, request: Request, now_s: float) -> int:
        queues = [queue for queue, _ in self._seen.values()]
        shortest, longest = min(queues), max(queues)
        hashes = request.block_hashes

        def score(index: int) -> tuple[float, float]:
            queue, free = self._seen[index]
            idle = (longest - queue) / (longest - shortest) if longest > shortest else 1.0
            hit = self._prefixes.cached_blocks(self._fleet[index].replica_id, hashes)
            total = 2 * idle + 2 * free / self._blocks_total + 3 * hit / max(1, len(hashes))
            return total, self._rng.random()

        best = max(self._seen, key=score)
        replica = self._fleet[best].replica_id
        self._prefixes.note(replica, hashes, self._blocks_total)
        return best

    def report(self, index: int, now_s: float) -> None:
        replica = self._fleet[index]
        self._seen[index] = len(replica.waiting), max(0, replica.free_blocks)


class Dynamo:
    """The selection service of the package ai-dynamo-runtime, which Ray's `KVAwareRouter` uses.

    It gets a request's tokens, and with each report what of its requests has been prefilled,
    decoded and ended. It knows prefixes by what it has sent where. It knows nothing of compression.
    """

    def __init__(self, fleet: Sequence[SimulatedReplica], blocks_total: int) -> None:
        """
        Raises:
            ImportError: the package is not installed.
        """
        # No replica publishes KV events here; and the log would have a line for each request.
        os.environ |= {"DYN_ROUTER_USE_KV_EVENTS": "false", "DYN_LOG": "error"}
        from dynamo.llm import SelectionService

        self._fleet, self._blocks_total = fleet, blocks_total
        self._loop = asyncio.new_event_loop()
        self._service: Any = self._run(lambda: _started(SelectionService))
        self._count = 0
        # Requests that it has sent and that have not ended, by replica.
        self._open: dict[int, dict[int, _Booked]] = {}
        for index in range(len(fleet)):
            self.report(index, 0.0)

    def __del__(self) -> None:
        self._service.shutdown()
        self._loop.close()

    def choose(self, request: Request, now_s: float) -> int:
        self._count += 1
        name = str(self._count)
        wanted = {**_MODEL, "selection_id": name, "token_ids": _tokens(request, self._count)}
        selection = self._run(lambda: self._service.select_and_reserve(wanted))
        index: int = selection["worker_id"]
        self._open[index][id(request)] = _Booked(name, request)
        return index

    def report(self, index: int, now_s: float) -> None:
        if index not in self._open:
            self._open[index] = {}
            self._run(lambda: self._service.upsert_worker(self._worker(index)))
        replica, booked = self._fleet[index], self._open[index]
        running = {id(one.request): one.done_tokens for one in replica.running}
        there = {*running, *(id(request) for request in replica.pending)}
        ended = {key: one for key, one in booked.items() if key not in there}

        async def tell() -> None:
            for key, tokens in running.items():
                await booked[key].progress(self._service, tokens)
            for key, one in ended.items():
                await self._service.free_reservation(one.name)
                del booked[key]

        self._run(tell)

    def _worker(self, index: int) -> dict[str, Any]:
        return {
            **_MODEL, "worker_id": index, "endpoint": f"simulated://{index}",
            "block_size": BLOCK_SIZE_TOKENS, "max_num_batched_tokens": _BATCHED_TOKENS,
            "total_kv_blocks": self._blocks_total, "data_parallel_start_rank": 0,
            "data_parallel_size": 1,
            # It must have one; nothing is there.
            "kv_events_endpoints": {0: f"ipc:///nonexistent/{index}"},
        }  # fmt: skip

    def _run(self, call: Callable[[], Awaitable[Any]]) -> Any:
        async def result() -> Any:
            # The service needs the loop of the caller.
            return await call()

        return self._loop.run_until_complete(result())


class _Booked:
    """A request as the selection service knows it."""

    def __init__(self, name: str, request: Request) -> None:
        self.name = name
        self._tokens = request.prompt_tokens
        self._blocks = -(-request.prompt_tokens // BLOCK_SIZE_TOKENS)
        self._prefilled = False

    async def progress(self, service: Any, output_tokens: int) -> None:
        """Tell the service that the prompt is complete, and of each new block."""
        if not self._prefilled:
            self._prefilled = True
            await service.prefill_complete(self.name)
        blocks = -(-(self._tokens + output_tokens) // BLOCK_SIZE_TOKENS)
        while self._blocks < blocks:
            self._blocks += 1
            service.add_output_block(self.name)


async def _started(service: Any) -> Any:
    return service(indexer_threads=1)


def _tokens(request: Request, number: int) -> list[int]:
    """Return a prompt of the request's length whose blocks are equal where their hashes are."""
    tokens = [
        (block ^ place * 2654435761) & 0x7FFFFFFF
        for block in request.block_hashes
        for place in range(BLOCK_SIZE_TOKENS)
    ]
    return tokens + [number] * (request.prompt_tokens - len(tokens))
