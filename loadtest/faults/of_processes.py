"""Faults of processes: killed, stopped for a while, and whole nodes."""

import asyncio
import signal
from contextlib import suppress

import psutil

from adakv_serve.loadtest.faults.scene import Scene, Strike

# An argument of the head's raylet alone.
_HEAD = "--head"


def killing(role: str) -> Strike:
    """Return what kills a process of a role."""

    async def strike(scene: Scene) -> tuple[()]:
        scene.one(role).kill()
        return ()

    return strike


def stopping(role: str, seconds: float) -> Strike:
    """Return what stops a process for a while; one that is replaced meanwhile does not go on."""

    async def strike(scene: Scene) -> tuple[()]:
        process = scene.one(role)
        process.send_signal(signal.SIGSTOP)
        try:
            # Ends early where another process takes its place.
            for _ in range(round(seconds * 10)):
                if not _lives(process):
                    break
                await asyncio.sleep(0.1)
        finally:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGCONT)
        return ()

    return strike


def _lives(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.status() != psutil.STATUS_ZOMBIE
    return False


async def kill_raylet(scene: Scene) -> tuple[()]:
    """Kill the raylet of the second node, and leave its workers to themselves."""
    scene.one("raylet", without=_HEAD).kill()
    return ()


async def kill_node(scene: Scene) -> tuple[()]:
    """Kill all processes of the second node at once, as a power cut does."""
    raylet = scene.one("raylet", without=_HEAD)
    for process in (raylet, *raylet.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            process.kill()
    return ()
