"""Offers and leases of memory that replicas lend to each other."""

from collections.abc import Iterable
from typing import Literal, NamedTuple

# `blocks`: KV blocks of the lender, for a request that goes on at once. `host_bytes`: memory of the
# lender's host, for a cache that waits for blocks.
Resource = Literal["blocks", "host_bytes"]
RESOURCES: tuple[Resource, ...] = ("blocks", "host_bytes")


class Offer(NamedTuple):
    """The most that a lender lends in all, present leases included.

    cache_kind: name of the kind of caches that it can read; those of another kind it would refuse.
    """

    lender: str
    blocks: int
    host_bytes: int
    cache_kind: str = ""

    def of(self, resource: Resource) -> int:
        return self.blocks if resource == "blocks" else self.host_bytes


class Room(NamedTuple):
    """What can still be leased of a lender: its offer less its leases, at least 0."""

    lender: str
    blocks: int
    host_bytes: int


class Lease(NamedTuple):
    """`amount` of a lender's resource, held by a borrower until it gives it back or it expires."""

    lease_id: str
    lender: str
    borrower: str
    resource: Resource
    amount: int


class Lending(NamedTuple):
    """All offers and leases at one instant that have not expired."""

    offers: list[Offer]
    leases: list[Lease]

    def lent(self, lender: str, resource: Resource = "blocks") -> int:
        return _sum(lease for lease in self.leases if lease.lender == lender)[resource]

    def borrowed(self, borrower: str, resource: Resource = "blocks") -> int:
        return _sum(lease for lease in self.leases if lease.borrower == borrower)[resource]

    def room(self, resource: Resource = "blocks") -> dict[str, int]:
        """Return what can still be leased of each lender; at least 0 after a lowered offer."""
        return {
            offer.lender: max(0, offer.of(resource) - self.lent(offer.lender, resource))
            for offer in self.offers
        }


def _sum(leases: Iterable[Lease]) -> dict[Resource, int]:
    sums: dict[Resource, int] = {"blocks": 0, "host_bytes": 0}
    for lease in leases:
        sums[lease.resource] += lease.amount
    return sums


def check_lending(lending: Lending) -> None:
    """Assert the invariants that hold while no lender has lowered or withdrawn its offer."""
    lenders = [offer.lender for offer in lending.offers]
    assert len(set(lenders)) == len(lenders), "a lender offers twice"
    ids = [lease.lease_id for lease in lending.leases]
    assert len(set(ids)) == len(ids), "a lease was given twice"
    for lease in lending.leases:
        assert lease.lender in lenders, "a lease without an offer"
        assert lease.lender != lease.borrower, "a replica borrows from itself"
        assert lease.amount > 0, "a lease of nothing"
    for offer in lending.offers:
        for resource in ("blocks", "host_bytes"):
            assert lending.lent(offer.lender, resource) <= offer.of(resource), "more than offered"
