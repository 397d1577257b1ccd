"""Parts of the spill that need no engine."""

import asyncio
import contextlib
import os
from pathlib import Path

import numpy as np
import pytest

from adakv_serve.serving.janitor import remove_orphans
from adakv_serve.serving.spill.membership import Membership
from adakv_serve.serving.spill.move import MoveReport
from adakv_serve.serving.spill.parcels import StateFiles, place_parcels
from adakv_serve.serving.supervision import Patience, Supervisor


def test_only_what_dead_replicas_have_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / "adakv-spill-dead").mkdir()
    files = StateFiles(tmp_path)
    with files.path() as path:
        remove_orphans(tmp_path)
        assert list(tmp_path.iterdir()) == [path.parent]
    files.clear()
    assert not list(tmp_path.iterdir())


def test_a_burst_of_moves_leaves_few_files(tmp_path: Path) -> None:
    files = StateFiles(tmp_path)
    with contextlib.ExitStack() as moves:
        paths = [moves.enter_context(files.path()) for _ in range(32)]
        for path in paths:
            path.write_bytes(b"a cache")
        assert len(list(tmp_path.iterdir())) == 32
    assert len(list(tmp_path.iterdir())) < 8
    with files.path() as path:
        assert path in paths
    files.clear()
    assert not list(tmp_path.iterdir())


def test_a_cache_from_another_node_is_refused_where_others_would_have_too_little_memory(
    tmp_path: Path,
) -> None:
    memory = os.statvfs(tmp_path)
    # Takes no memory itself.
    huge = np.broadcast_to(np.zeros(1, dtype=np.uint8), (memory.f_blocks * memory.f_frsize,))
    with pytest.raises(OSError, match="too little"):
        place_parcels([huge], tmp_path / "state")
    assert not list(tmp_path.iterdir())


async def test_a_replica_follows_its_own_changes_alone_and_each_once() -> None:
    seen: asyncio.Queue[bool] = asyncio.Queue()
    membership = Membership("one")
    following = asyncio.create_task(membership.follow(seen.put))
    for before, after in (
        ([], ["other"]),
        (["one", "other"], ["one"]),
        (["one"], []),
        # A second router's report of the same change.
        (["one", "other"], ["other"]),
        ([], ["one"]),
    ):
        await asyncio.to_thread(membership.update, before, after)
    assert [await seen.get(), await seen.get()] == [False, True]
    assert seen.empty()
    following.cancel()


async def test_a_change_that_could_not_be_followed_is_followed_again() -> None:
    seen: asyncio.Queue[bool] = asyncio.Queue()

    async def fail_once(is_there: bool) -> None:
        await seen.put(is_there)
        if seen.qsize() == 1:
            raise OSError("no lender")

    membership = Membership("one")
    tasks = Supervisor(patience=Patience(first_pause_s=0))
    task = tasks.keep("membership", lambda: membership.follow(fail_once))
    membership.update(["one"], [])
    async with asyncio.timeout(60):
        while seen.qsize() < 2:
            await asyncio.sleep(0)
        membership.update([], ["one"])
        assert [await seen.get() for _ in range(3)] == [False, False, True]
    await task.stop()


async def test_a_change_that_was_revoked_before_it_could_be_followed_is_over() -> None:
    seen: asyncio.Queue[bool] = asyncio.Queue()

    async def fail(is_there: bool) -> None:
        await seen.put(is_there)
        membership.update([], ["one"])
        raise OSError("no lender")

    membership = Membership("one")
    membership.update(["one"], [])
    with pytest.raises(OSError, match="no lender"):
        await membership.follow(fail)
    following = asyncio.create_task(membership.follow(seen.put))
    membership.update(["one"], [])
    async with asyncio.timeout(60):
        assert [await seen.get(), await seen.get()] == [False, False]
    following.cancel()


def test_waiting_for_a_steps_end_is_no_cost_of_a_move() -> None:
    report = MoveReport(
        "one",
        "lender",
        state_bytes=10_000_000,
        export_s=3.0,
        arrival_s=3.1,
        seconds=5,
        problem=None,
    )
    assert report.bytes_per_s == pytest.approx(1e8)
