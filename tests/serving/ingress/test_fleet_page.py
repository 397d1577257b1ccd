"""What an ingress shows on its fleet page."""

import asyncio

from serving.config import AppConfig
from serving.http.page.feed import Scale
from serving.ingress.fleet_page import ScaleWatch, configured_facts


def test_the_page_offers_what_requests_may_ask_for() -> None:
    assert configured_facts(AppConfig())["compression"] is None
    config = AppConfig.model_validate(
        {"compression": {"allow_full": False, "max_budget_tokens": 512, "allow_detail": True}}
    )
    offered = configured_facts(config)["compression"]
    assert {"auto", "kv_compress"} <= set(offered["policies"])
    assert "full" not in offered["policies"]
    assert (offered["min_budget_tokens"], offered["max_budget_tokens"]) == (64, 512)
    assert offered["detail"] is True


async def test_the_wanted_size_is_asked_for_while_somebody_looks() -> None:
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

    watch = ScaleWatch(ask, pause_s=0)
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
