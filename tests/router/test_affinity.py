"""The prefix affinity as a state machine."""

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from router.affinity import PrefixAffinity, check_affinity


class AffinityMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.affinity = PrefixAffinity()

    @rule(
        replica=st.sampled_from("abc"),
        hashes=st.lists(st.integers(0, 9), unique=True, max_size=8),
        capacity=st.integers(0, 6),
    )
    def note(self, replica: str, hashes: list[int], capacity: int) -> None:
        self.affinity.note(replica, hashes, capacity)
        if len(hashes) <= capacity:
            assert self.affinity.cached_blocks(replica, hashes) == len(hashes)

    @rule(
        replica=st.sampled_from("abc"),
        hashes=st.lists(st.integers(0, 9), unique=True, min_size=1, max_size=8),
    )
    def discard(self, replica: str, hashes: list[int]) -> None:
        self.affinity.discard(replica, hashes)
        assert self.affinity.cached_blocks(replica, hashes) == 0

    @rule(replica=st.sampled_from("abc"))
    def forget(self, replica: str) -> None:
        self.affinity.forget(replica)
        assert self.affinity.cached_blocks(replica, list(range(10))) == 0

    @rule(hashes=st.lists(st.integers(0, 9), unique=True, max_size=8))
    def holders(self, hashes: list[int]) -> None:
        longest = max((self.affinity.cached_blocks(r, hashes) for r in "abc"), default=0)
        if longest == len(hashes) > 0:
            assert self.affinity.holders(hashes)

    @invariant()
    def consistent(self) -> None:
        check_affinity(self.affinity)


TestAffinity = AffinityMachine.TestCase
