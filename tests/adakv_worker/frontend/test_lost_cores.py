"""Engine cores that fail, die or are shut down: no task waits for them, and nothing is left."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest, FinishReason

from adakv_worker.frontend.moving import Departure, MovingCore
from adakv_worker.frontend.sent_requests import BookedCore, SentRequests
from adakv_worker.messages import with_proof
from tests.adakv_worker.proofs import make_proof

PROOF = make_proof(policy="snapkv")


class Core:
    """A client of an engine core that does what the test says."""

    def __init__(self) -> None:
        self.outputs: asyncio.Queue[EngineCoreOutputs | Exception] = asyncio.Queue()
        self.on_add: Callable[[EngineCoreRequest], None] = lambda request: None
        self.aborted: list[str] = []
        # What the workers answer; without, they never do.
        self.answer: list[Any] | None = None
        self.called = asyncio.Event()

    async def add_request_async(self, request: EngineCoreRequest) -> None:
        self.on_add(request)

    async def abort_requests_async(self, request_ids: list[str]) -> None:
        self.aborted += request_ids

    async def get_output_async(self) -> EngineCoreOutputs:
        outputs = await self.outputs.get()
        if isinstance(outputs, Exception):
            raise outputs
        return outputs

    async def collective_rpc_async(self, *_: Any) -> list[Any]:
        self.called.set()
        if self.answer is None:
            await asyncio.Event().wait()
        assert self.answer is not None
        return self.answer

    def shutdown(self) -> None:
        pass


class Front:
    """A front end with one compressed request, of which one token is decoded."""

    def __init__(self) -> None:
        self.core = Core()
        self.sent = SentRequests()
        self.moving = MovingCore(BookedCore(self.core, self.sent))

    async def asks(self, name: str = "asked") -> None:
        await self.moving.add_request_async(request(name))
        self.decodes(name)
        await self.moving.get_output_async()

    def decodes(self, name: str) -> None:
        output = EngineCoreOutput(name, [7], kv_transfer_params=with_proof(PROOF))
        self.core.outputs.put_nowait(EngineCoreOutputs(outputs=[output]))

    def dies(self) -> None:
        self.core.outputs.put_nowait(RuntimeError("dead"))


def request(name: str) -> EngineCoreRequest:
    return EngineCoreRequest(
        request_id=name, prompt_token_ids=[5, 6], mm_features=None,
        sampling_params=SamplingParams(max_tokens=9), pooling_params=None, arrival_time=0.0,
        lora_request=None, cache_salt=None, data_parallel_rank=None,
    )  # fmt: skip


async def soon(awaited: Any) -> Any:
    async with asyncio.timeout(20):
        return await awaited


def ends(front: Front, way: str) -> None:
    if way == "dies":
        front.dies()
    else:
        front.moving.shutdown()


@pytest.mark.parametrize("way", ["dies", "shut down"])
@pytest.mark.parametrize("exported", [True, False])
async def test_a_request_that_leaves_a_lost_core_is_told(exported: bool, way: str) -> None:
    front = Front()
    await front.asks()
    # Its cache has one token more than its stream, which never comes.
    front.core.answer = [[5, 6, 7, 8]] if exported else None
    leaving = asyncio.create_task(front.moving.leave("asked", "/nowhere"))
    await front.core.called.wait()
    ends(front, way)
    with pytest.raises(ConnectionError):
        await soon(leaving)
    assert not front.moving.is_away("asked")


@pytest.mark.parametrize("way", ["dies", "shut down"])
@pytest.mark.parametrize("staged", [True, False])
async def test_a_guest_of_a_lost_core_is_told(staged: bool, way: str) -> None:
    front = Front()
    await front.asks()
    front.core.answer = [None] if staged else None
    departure = Departure(request("guest"), [5, 6, 7], PROOF)
    outputs = front.moving.take_in(departure, "/nowhere")
    first = asyncio.ensure_future(anext(outputs))
    await front.core.called.wait()
    while staged and not front.sent.newest_but(1):
        await asyncio.sleep(0)
    ends(front, way)
    with pytest.raises((ConnectionError, RuntimeError)):
        await soon(first)
    assert front.moving.guests == 0


async def test_a_lost_core_takes_no_guests() -> None:
    front = Front()
    await front.asks()
    front.core.answer = [None]
    front.dies()
    with pytest.raises(RuntimeError, match="dead"):
        await front.moving.get_output_async()
    departure = Departure(request("guest"), [5, 6, 7], PROOF)
    with pytest.raises(ConnectionError):
        await soon(anext(front.moving.take_in(departure, "/nowhere")))


@pytest.mark.parametrize("error", [OSError("no socket"), asyncio.CancelledError()])
async def test_a_request_that_cannot_be_sent_is_nowhere(error: BaseException) -> None:
    front = Front()

    def fail(request: EngineCoreRequest) -> None:
        raise error

    front.core.on_add = fail
    with pytest.raises(type(error)):
        await front.moving.add_request_async(request("asked"))
    assert front.sent.unseen() == front.sent.unanswered() == front.sent.newest_but(0) == []
    # What the engine decodes all the same makes it no request of this front end.
    front.decodes("asked")
    await front.moving.get_output_async()
    assert front.moving.movable() == []


async def test_a_request_that_cannot_come_back_ends_with_an_error() -> None:
    front = Front()
    await front.asks()
    front.core.answer = [[5, 6, 7]]
    assert await front.moving.leave("asked", "/nowhere") is not None
    ended = asyncio.Event()
    front.moving.on_end("asked", ended.set)

    def fail(request: EngineCoreRequest) -> None:
        raise OSError("no socket")

    front.core.on_add = fail
    with pytest.raises(OSError, match="no socket"):
        await front.moving.come_back("asked")
    (output,) = (await soon(front.moving.get_output_async())).outputs
    assert (output.request_id, output.finish_reason) == ("asked", FinishReason.ERROR)
    assert ended.is_set()
    assert (front.moving.away, front.sent.newest_but(0)) == (0, [])
    # It may have reached the engine.
    assert front.core.aborted[-1].startswith("asked-")
