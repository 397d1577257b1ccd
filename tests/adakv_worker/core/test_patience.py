"""How long requests without a held cache leave young ones alone."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.sched.request_queue import FCFSRequestQueue

from adakv_worker.config import SessionsConfig
from adakv_worker.core.floor import Floor
from adakv_worker.core.held import Held
from adakv_worker.core.sessions import Sessions


@pytest.mark.parametrize(("overtake_s", "waited_s", "young"), [
    (60.0, 30.0, 3), (60.0, 61.0, 0),
    # Nobody is overtaken, but young caches are still left alone.
    (0.0, 0.1, 3), (0.0, 0.6, 0),
])  # fmt: skip
def test_patience_ends_for_a_request_that_has_waited(
    overtake_s: float, waited_s: float, young: int
) -> None:
    pool = BlockPool(41, enable_caching=True, hash_block_size=4)
    spec = SimpleNamespace(page_size_bytes=1)
    manager: Any = SimpleNamespace(block_pool=pool, block_size=4, kv_cache_spec=spec, held=None)
    sessions = Sessions(SessionsConfig(overtake_s=overtake_s, patience_s=0.5), manager, 1, 4)
    blocks = tuple(pool.get_new_blocks(3))
    manager.held.hold(Held("a", "s", np.arange(9), 9, Floor(0, 0), 0, blocks, turn=1))
    waiting = FCFSRequestQueue()
    request: Any = SimpleNamespace(arrival_time=1000.0 - waited_s, request_id="r")
    waiting.append(request)
    sessions.order(waiting, 1000.0)
    assert manager.held.young_blocks() == young
