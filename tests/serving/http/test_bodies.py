"""Bodies of requests: limits of one, of all at once, and of the time that they take."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adakv_serve.serving.http.asgi import Message
from adakv_serve.serving.http.bodies import Bodies, Body, BodyRefused, ClientGone
from tests.serving.http.scripted_backend import WHOLE, ScriptedBackend, client, error_of


class Sender:
    """Sends the parts of a body, and then leaves, or sends nothing more."""

    def __init__(self, *parts: bytes, leaves: bool = True, ends: bool = True) -> None:
        self._messages: list[Message] = [
            {"type": "http.request", "body": part, "more_body": not ends or place < len(parts)}
            for place, part in enumerate(parts, start=1)
        ]
        self._leaves = leaves

    async def __call__(self) -> Message:
        if self._messages:
            return self._messages.pop(0)
        if not self._leaves:
            await asyncio.Event().wait()
        return {"type": "http.disconnect"}


@given(
    bodies=st.lists(st.lists(st.binary(max_size=30), min_size=1, max_size=4), max_size=8),
    most=st.integers(1, 60),
    most_held=st.integers(1, 150),
)
def test_held_bytes_are_those_of_the_bodies_that_are_not_released(
    bodies: list[list[bytes]], most: int, most_held: int
) -> None:
    held = Bodies(most, most_held, 60.0)

    async def read_all() -> None:
        read: list[tuple[Body, bytes]] = []
        for parts in bodies:
            body, whole = Body(held), b"".join(parts)
            before = held.held_bytes
            try:
                assert await body.read(Sender(*parts), "") == whole
                assert len(whole) <= most
                read.append((body, whole))
            except BodyRefused as refused:
                assert refused.is_busy or len(whole) > most  # noqa: PT017
                assert not refused.is_busy or before + len(whole) > most_held  # noqa: PT017
                body.release()
            assert held.held_bytes == sum(len(one) for _, one in read) <= most_held
        for body, _ in read:
            body.release()
            body.release()
        assert held.held_bytes == 0

    asyncio.run(read_all())


async def test_a_sender_that_leaves_is_gone() -> None:
    with pytest.raises(ClientGone):
        await Body(Bodies(9, 9, 60.0)).read(Sender(b"half", ends=False), "8")


@pytest.mark.parametrize(("length", "status"), [("10", 413), ("²", 413), ("9" * 5000, 413)])
async def test_a_declared_length_is_refused_before_anything_is_read(
    length: str, status: int
) -> None:
    with pytest.raises(BodyRefused) as refused:
        await Body(Bodies(9, 99, 60.0)).read(Sender(leaves=False), length)
    assert refused.value.status == status


async def test_a_slow_body_is_408() -> None:
    async def parts() -> AsyncIterator[bytes]:
        yield b"half"
        await asyncio.Event().wait()

    backend = ScriptedBackend([WHOLE])
    response = await client(backend, body_timeout_s=0.01).post("/v1/completions", content=parts())
    assert response.status_code == 408
    error_of(response)
    assert backend.calls == []


async def test_bodies_without_room_are_503_until_another_request_ends() -> None:
    is_answered = asyncio.Event()
    backend = ScriptedBackend([is_answered, *[WHOLE]], [WHOLE])
    door = client(backend, max_held_body_bytes=20)
    first = asyncio.create_task(door.post("/v1/completions", content=b"x" * 15))
    while not backend.calls:
        await asyncio.sleep(0)
    response = await door.post("/v1/completions", content=b"x" * 15)
    assert (response.status_code, response.headers["retry-after"]) == (503, "1")
    is_answered.set()
    assert (await first).status_code == 200
    assert (await door.post("/v1/completions", content=b"x" * 15)).status_code == 200
