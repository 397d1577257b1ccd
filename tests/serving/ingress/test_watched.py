"""Values that Serve's controller knows."""

import asyncio

from adakv_serve.serving.http.page.feed import Scale
from adakv_serve.serving.ingress.watched import Watched


async def test_a_value_is_asked_for_while_somebody_wants_it() -> None:
    asked, wanted = 0, False
    answered = asyncio.Event()
    loop = asyncio.get_running_loop()

    def ask() -> Scale:
        nonlocal asked
        asked += 1
        loop.call_soon_threadsafe(answered.set)
        if asked == 1:
            raise RuntimeError("the controller is about to start")
        return Scale(3, 1, 4)

    watch = Watched("the size", ask, pause_s=0)
    task = asyncio.create_task(watch.run(lambda: wanted))
    for _ in range(3):
        await asyncio.sleep(0)
    assert asked == 0
    wanted = True
    async with asyncio.timeout(60):
        while watch.latest is None:
            await answered.wait()
            await asyncio.sleep(0)
    assert (watch.latest, asked >= 2) == (Scale(3, 1, 4), True)
    task.cancel()
