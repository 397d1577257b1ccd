"""Engine cores that fail, die or are shut down: no task waits for them, and nothing is left."""

import asyncio
from typing import Any

import pytest
from vllm.v1.engine import EngineCoreRequest, FinishReason

from adakv_worker.frontend.moving import Departure
from tests.adakv_worker.frontend.stub_core import PROOF, Front, request


async def soon(awaited: Any) -> Any:
    async with asyncio.timeout(20):
        return await awaited


def ends(front: Front, way: str) -> None:
    if way == "dies":
        front.dies()
    elif way == "outputs cancelled":
        front.dies(asyncio.CancelledError("by a library"))
    else:
        front.moving.shutdown()


@pytest.mark.parametrize("way", ["dies", "outputs cancelled", "shut down"])
@pytest.mark.parametrize("exported", [True, False])
async def test_leaving_a_lost_core_fails(exported: bool, way: str) -> None:
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


@pytest.mark.parametrize("way", ["dies", "outputs cancelled", "shut down"])
@pytest.mark.parametrize("staged", [True, False])
async def test_a_guest_of_a_lost_core_fails(staged: bool, way: str) -> None:
    front = Front()
    await front.asks()
    front.core.answer = [None] if staged else None
    departure = Departure(request("guest"), [5, 6, 7], PROOF)
    outputs = front.moving.take_in(departure, "/nowhere")
    added = asyncio.Event()
    front.core.on_add = lambda _: added.set()
    first = asyncio.ensure_future(anext(outputs))
    await soon((added if staged else front.core.called).wait())
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


async def test_a_call_after_the_end_of_a_core_fails_like_one_at_its_end() -> None:
    front = Front()
    front.core.refuses = True
    with pytest.raises(ConnectionError):
        await soon(front.moving.call_workers("adakv_list_held", ()))


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


async def test_a_front_end_does_not_wait_for_outputs_that_have_ended() -> None:
    front = Front()
    await front.asks()
    front.dies(asyncio.CancelledError("by a library"))
    with pytest.raises(ConnectionError):
        await soon(front.moving.get_output_async())
