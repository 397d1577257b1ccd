"""Requests before a full queue: who gives way, and who gets the place."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from ray.serve.exceptions import BackPressureError

from adakv_serve.serving.http.failures import Overloaded
from adakv_serve.serving.ingress.shedding import Shedding


class Queue:
    """A handle's queue with so many places, in which requests wait until they are cancelled."""

    def __init__(self, places: int) -> None:
        self.places = places
        self.waiting: list[Placed] = []
        self.shedding = Shedding()

    def ask(self, priority: int) -> asyncio.Task[Any]:
        call = self.shedding.begin(lambda: Placed(self, priority), priority)
        return asyncio.create_task(call)

    async def holds(self, *priorities: int) -> None:
        """Wait until it holds these, and until the ingress knows that they have their places."""
        async with asyncio.timeout(60):
            while sorted(one.priority for one in self.waiting) != sorted(priorities):
                await asyncio.sleep(0.005)
            sheddable = sum(priority > 0 for priority in priorities)
            while len(self.shedding._placed) < sheddable or self.shedding._claims:
                await asyncio.sleep(0.005)


class Placed:
    """A call that takes a place in the queue when its answer is awaited."""

    def __init__(self, queue: Queue, priority: int) -> None:
        self._queue, self.priority = queue, priority

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        if len(self._queue.waiting) >= self._queue.places:
            raise BackPressureError(num_queued_requests=1, max_queued_requests=1)
        self._queue.waiting.append(self)
        await asyncio.Event().wait()

    def cancel(self) -> None:
        # Serve takes a moment to count it no more.
        asyncio.get_running_loop().call_later(0.05, self._queue.waiting.remove, self)


async def ended(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_the_least_important_gives_way_when_the_queue_is_full() -> None:
    queue = Queue(places=3)
    first, second, third = queue.ask(2), queue.ask(0), queue.ask(2)
    await queue.holds(2, 0, 2)
    # As important as the least important ones: none gives way.
    with pytest.raises(BackPressureError):
        await queue.ask(2)
    important = queue.ask(-1)
    with pytest.raises(Overloaded):
        await third
    await queue.holds(2, 0, -1)
    usual = queue.ask(0)
    with pytest.raises(Overloaded):
        await first
    await queue.holds(0, -1, 0)
    # Requests of the usual priority are not shed.
    with pytest.raises(BackPressureError):
        await queue.ask(-5)
    await ended(second, important, usual)
    await queue.holds()


async def test_nobody_less_important_takes_the_place_that_was_made() -> None:
    queue = Queue(places=1)
    shed = queue.ask(9)
    await queue.holds(9)
    important = queue.ask(0)
    with pytest.raises(Overloaded):
        await shed
    # The queue is about to have a place, for which another one waits.
    with pytest.raises(Overloaded):
        await queue.ask(9)
    await queue.holds(0)
    await ended(important)
    await queue.holds()
    # Nobody waits for a place any more.
    late = queue.ask(9)
    await queue.holds(9)
    await ended(late)


async def test_others_give_way_where_one_was_not_enough() -> None:
    queue = Queue(places=3)
    low = [queue.ask(9) for _ in range(3)]
    await queue.holds(9, 9, 9)
    # Two places are lost.
    queue.places = 1
    important = queue.ask(0)
    await queue.holds(0)
    assert all(
        isinstance(one, Overloaded) for one in await asyncio.gather(*low, return_exceptions=True)
    )
    await ended(important)


async def test_one_that_waits_for_room_gives_way_itself() -> None:
    queue = Queue(places=1)
    shed = queue.ask(9)
    await queue.holds(9)
    # It waits for the place of the first, and the next one for its own.
    middle = queue.ask(5)
    while not queue.shedding._claims:
        await asyncio.sleep(0.001)
    important = queue.ask(0)
    for one in (shed, middle):
        with pytest.raises(Overloaded):
            await one
    await queue.holds(0)
    await ended(important)
