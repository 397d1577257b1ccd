"""The prefix affinity, and as a state machine."""

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from adakv_serve.router.affinity import PrefixAffinity, check_affinity


def test_the_least_recently_sent_blocks_go_first() -> None:
    affinity = PrefixAffinity()
    affinity.note("a", [1, 2], 3)
    affinity.note("b", [1, 3], 3)
    affinity.note("a", [1, 4, 5], 3)
    assert affinity.cached_blocks("a", [1, 4, 5]) == 3
    assert affinity.cached_blocks("a", [2]) == 0
    assert affinity.holders([2]) == set()
    assert affinity.holders([1]) == {"a", "b"}
    check_affinity(affinity)


def test_the_longest_prefix_names_the_holders() -> None:
    affinity = PrefixAffinity()
    affinity.note("a", [1, 2, 3], 9)
    affinity.note("b", [1, 2], 9)
    assert affinity.holders([1, 2, 3, 4]) == {"a"}
    assert affinity.holders([1, 2, 9]) == {"a", "b"}
    assert affinity.holders([]) == set()
    assert affinity.cached_blocks("b", [1, 2, 3]) == 2
    assert affinity.cached_blocks("c", [1]) == 0


def test_blocks_are_forgotten_of_one_replica_alone() -> None:
    affinity = PrefixAffinity()
    affinity.note("a", [1, 2], 9)
    affinity.note("b", [1, 2], 9)
    affinity.discard("a", [2, 7])
    affinity.discard("c", [1])
    assert affinity.holders([2]) == {"b"}
    assert affinity.cached_blocks("a", [1, 2]) == 1
    affinity.forget("b")
    assert affinity.holders([1]) == {"a"}
    assert affinity.replica_ids == ["a"]
    check_affinity(affinity)


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
