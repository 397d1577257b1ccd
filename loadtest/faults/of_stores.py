"""Faults of the store, and of the network before it."""

import asyncio

import redis.asyncio

from adakv_serve.loadtest.faults.scene import Scene
from adakv_serve.loadtest.servers.ports import free_port
from adakv_serve.router.stores import full_url

_READ_ONLY_S = 5.0
_STALLED_S, _CUT_S = 6.0, 4.0


def _client(scene: Scene) -> redis.asyncio.Redis:
    # With the password that the embedded store's actor has kept for this user.
    return redis.asyncio.from_url(full_url(f"redis://127.0.0.1:{scene.store_port}"))


async def flush(scene: Scene) -> tuple[()]:
    """Lose all that is stored."""
    async with _client(scene) as store:
        await store.flushall()
    return ()


async def refuse_writes(scene: Scene) -> tuple[()]:
    """Make the store a replica of nothing for a while, as a failover does to the former primary."""
    async with _client(scene) as store:
        await store.execute_command("REPLICAOF", "127.0.0.1", free_port())
        try:
            await asyncio.sleep(_READ_ONLY_S)
        finally:
            await store.execute_command("REPLICAOF", "NO", "ONE")
    return ()


async def part(scene: Scene) -> tuple[()]:
    """Part all from the store: first nothing arrives, then connections are reset and refused."""
    assert scene.store is not None, "only our own store has a network of its own"
    await scene.store.stall(_STALLED_S)
    await scene.store.cut(_CUT_S)
    return ()
