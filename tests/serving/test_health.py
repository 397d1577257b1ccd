"""A process whose background task cannot go on is unhealthy, and Serve replaces it."""

import asyncio
import pickle
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from adakv_serve.serving.engine import Engine
from adakv_serve.serving.ingress.deployment import Ingress
from adakv_serve.serving.supervision import Patience, Supervisor, TaskFailing


class LivingHost:
    """An engine without faults."""

    def check(self) -> None:
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


class DeadEngine:
    """vLLM's front end after the death of its engine process."""

    errored = True

    async def is_paused(self) -> bool:
        return False

    async def check_health(self) -> None:
        from vllm.v1.engine.exceptions import EngineDeadError

        raise EngineDeadError


async def test_a_dead_engine_fails_the_health_check_and_nobody_needs_vllm_to_read_why() -> None:
    from adakv_serve.serving.vllm_engine.host import VllmHost

    engine: Any = DeadEngine()
    app: Any = None
    stats: Any = None
    process = SimpleNamespace(_host=VllmHost(engine, app, stats), _tasks=Supervisor())
    with pytest.raises(Exception, match="engine process has died") as failure:
        await Engine.check_health(process)  # type: ignore[arg-type]
    # As Serve's controller does, which serves the whole cluster.
    code = "import pickle, sys; pickle.load(sys.stdin.buffer); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], input=pickle.dumps(failure.value), check=True)
