"""Held caches while requests begin, end, go on, branch off, and arrive: nothing gets lost."""

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from vllm.v1.core.kv_cache_utils import KVCacheBlock

from adakv_worker.core.floor import Floor
from adakv_worker.core.held import Held
from tests.adakv_worker.core.held_pool import BLOCKS, IDLE_S, Pool, tokens


class Lives(RuleBasedStateMachine):
    """Requests take blocks, end, and go on, while time passes."""

    @initialize(
        reach_blocks=st.integers(1, 12),
        host_blocks=st.integers(0, 30),
        arrived_blocks=st.integers(0, 9),
    )
    def begin(self, reach_blocks: int, host_blocks: int, arrived_blocks: int) -> None:
        self.pool = Pool(reach_blocks, host_blocks, arrived_blocks)
        self.running: list[list[KVCacheBlock]] = []
        self.gone: list[str] = []
        self.names: list[str] = []

    @rule(count=st.integers(1, 15))
    def start(self, count: int) -> None:
        if count <= self.pool.pool.get_num_free_blocks():
            self.running.append(self.pool.pool.get_new_blocks(count))

    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        if self.running:
            index = data.draw(st.integers(0, len(self.running) - 1))
            self.pool.pool.free_blocks(reversed(self.running.pop(index)))

    @rule(data=st.data(), ids=st.lists(st.integers(1, 2), min_size=1, max_size=5))
    def end_and_hold(self, data: st.DataObject, ids: list[int]) -> None:
        if not self.running:
            return
        blocks = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
        floor = data.draw(st.integers(0, len(ids)))
        name = self.pool.held.next_name()
        self.names.append(name)
        held = Held(
            name, "a", tokens(*ids), len(ids), Floor(floor, 0), floor, tuple(blocks), 1,
            has_session=data.draw(st.booleans()),
        )  # fmt: skip
        self.pool.held.hold(held)

    @rule(ids=st.lists(st.integers(1, 2), min_size=2, max_size=6))
    def go_on(self, ids: list[int]) -> None:
        match = self.pool.held.find("a", tokens(*ids))
        if match is None:
            return
        assert match.held.token_ids[: match.tokens].tolist() == ids[: match.tokens]
        assert match.held.floor.tokens <= match.tokens < len(ids)
        if match.held.size_blocks > self.pool.pool.get_num_free_blocks():
            return
        taken = self.pool.held.take(match.held.name)
        assert all(block.ref_cnt == 1 for block in taken.blocks)
        assert bool(taken.blocks) is (taken.source == "pool")
        fresh = [] if taken.blocks else self.pool.pool.get_new_blocks(taken.parked_blocks)
        self.running.append([*taken.blocks, *fresh])
        self.names.remove(taken.name)

    @rule(
        ids=st.lists(st.integers(1, 2), min_size=1, max_size=5),
        blocks=st.integers(1, 9),
        has_session=st.booleans(),
    )
    def come_from_another_replica(self, ids: list[int], blocks: int, has_session: bool) -> None:
        arrived = self.pool.arrive(tokens(*ids), blocks, has_session=has_session)
        self.names.append(arrived.name)

    @rule(ids=st.lists(st.integers(1, 2), min_size=2, max_size=6), count=st.integers(1, 9))
    def branch_off(self, ids: list[int], count: int) -> None:
        match = self.pool.held.find("a", tokens(*ids))
        free = self.pool.pool.get_num_free_blocks()
        if match is None or count > free - len(match.held.blocks):
            return
        lent = self.pool.held.lend(match.held.name)
        assert lent is match.held
        self.running.append(self.pool.pool.get_new_blocks(count))
        # The workers can copy it.
        assert lent.name in self.pool.held

    @rule(seconds=st.sampled_from([0.0, 1.0, IDLE_S]))
    def step(self, seconds: float) -> None:
        self.pool.now_s += seconds
        self.pool.held.next_step()

    @rule()
    def forget(self) -> None:
        self.pool.held.forget()
        assert len(self.pool.held) == 0

    @invariant()
    def nothing_is_lost_or_counted_twice(self) -> None:
        self.pool.held.check()
        used = sum(len(blocks) for blocks in self.running)
        assert self.pool.pool.get_num_free_blocks() == BLOCKS - 1 - used
        for blocks in self.running:
            assert all(block.ref_cnt == 1 for block in blocks)

    @invariant()
    def every_cache_is_held_or_the_workers_are_told_once(self) -> None:
        self.gone += self.pool.held.take_gone()
        assert sorted(self.names) == sorted([*self.gone, *(one.name for one in self.pool.held)])


TestLives = Lives.TestCase
