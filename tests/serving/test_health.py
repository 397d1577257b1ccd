"""A process whose background task cannot go on is unhealthy, and Serve replaces it."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from serving.engine import Engine
from serving.ingress.deployment import Ingress
from serving.supervision import Patience, Supervisor, TaskFailing


class LivingHost:
    """An engine without faults."""

    async def check(self) -> None:
        pass


@pytest.mark.parametrize("owner", [Engine, Ingress])
async def test_a_task_that_fails_for_ever_fails_the_health_check_of_its_process(
    owner: Any,
) -> None:
    begun = 0

    async def fail() -> None:
        nonlocal begun
        begun += 1
        raise ZeroDivisionError("a bug")

    tasks = Supervisor(patience=Patience(first_pause_s=0, most_failures=3, steady_s=1e9))
    process = SimpleNamespace(_host=LivingHost(), _tasks=tasks)
    await owner.check_health(process)
    tasks.keep("work", fail)
    async with asyncio.timeout(60):
        while begun < 4:
            await asyncio.sleep(0)
    with pytest.raises(TaskFailing, match="work"):
        await owner.check_health(process)
    await tasks.stop()
