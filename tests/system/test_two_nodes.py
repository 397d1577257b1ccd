"""A small replica on one Ray node, a lender on another: caches cross between object stores.

Where it can be had, a firewall lies between them that lets through what docs/multinode.md lists.
"""

from collections.abc import Iterator

import pytest

from adakv_serve.loadtest.servers.two_nodes import sent_bytes
from adakv_serve.serving.spill.parcels import LenderName
from tests.system.deployment import Deployment, TwoNodes, deployed, spill_config
from tests.system.firewalled import Firewalled, can_part, firewalled_config
from tests.system.spilling import ask_many, lending, lent, moves, read_as_if_alone
from tests.waiting import eventually

pytestmark = [pytest.mark.slow, pytest.mark.long]


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[Deployment]:
    parted = can_part()
    kind, config = (Firewalled, firewalled_config) if parted else (TwoNodes, spill_config)
    with deployed(kind, config) as deployment:
        yield deployment


def test_caches_cross_between_nodes_and_no_client_notices(two_nodes: Deployment) -> None:
    offers = eventually(lambda: lending(two_nodes).offers, 30, "offers")
    assert len({LenderName.of(offer.lender).node_id for offer in offers}) == 2

    def crossed() -> float:
        return sent_bytes(two_nodes.metrics_url)

    before = crossed()
    crowded = ask_many(two_nodes, range(8))
    moved = eventually(lambda: moves(two_nodes), 30, "a request that has moved")
    eventually(
        lambda: crossed() - before > sum(move["bytes"] for move in moved) / 2,
        60,
        "the bytes in the object managers' count",
    )
    assert read_as_if_alone(two_nodes, crowded)
    eventually(lambda: not lending(two_nodes).leases, 30, "everything given back")
    # Replicas tell of themselves once in a while.
    eventually(lambda: lent(two_nodes) == 0 == two_nodes.running(), 30, "an idle deployment")
    if isinstance(two_nodes, Firewalled):
        before = two_nodes.dropped()[two_nodes.head]
        assert not two_nodes.lets_in(12345)
        assert two_nodes.dropped()[two_nodes.head] > before
