"""Memory that replicas lend to each other: what is offered, and what is leased of it."""

from collections.abc import Iterable
from typing import Literal, NamedTuple

# `blocks`: KV blocks of the lender, where a request goes on. `host_bytes`: of its host's memory,
# where a cache waits.
Resource = Literal["blocks", "host_bytes"]


class Offer(NamedTuple):
    """What a lender would have lent out in all, its guests of now included."""

    lender: str
    blocks: int
    host_bytes: int

    def of(self, resource: Resource) -> int:
        return self.blocks if resource == "blocks" else self.host_bytes


class Lease(NamedTuple):
    """`amount` of a lender's resource, a borrower's until it gives it back or lets it end."""

    lease_id: str
    lender: str
    borrower: str
    resource: Resource
    amount: int


class Lending(NamedTuple):
    """All offers and leases at one instant, those left out that have ended."""

    offers: list[Offer]
    leases: list[Lease]

    def lent(self, lender: str, resource: Resource = "blocks") -> int:
        return _sum(lease for lease in self.leases if lease.lender == lender)[resource]

    def borrowed(self, borrower: str, resource: Resource = "blocks") -> int:
        return _sum(lease for lease in self.leases if lease.borrower == borrower)[resource]

    def room(self, resource: Resource = "blocks") -> dict[str, int]:
        """What can still be leased, by lender. One that has lowered its offer may have none."""
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
    """Asserts what holds while no lender has lowered its offer or gone away."""
    lenders = [offer.lender for offer in lending.offers]
    assert len(set(lenders)) == len(lenders), "a lender offers twice"
    ids = [lease.lease_id for lease in lending.leases]
    assert len(set(ids)) == len(ids), "a lease was given twice"
    for lease in lending.leases:
        assert lease.lender in lenders, "a lease of what nobody offers"
        assert lease.lender != lease.borrower, "a replica borrows from itself"
        assert lease.amount > 0, "a lease of nothing"
    for offer in lending.offers:
        for resource in ("blocks", "host_bytes"):
            assert lending.lent(offer.lender, resource) <= offer.of(resource), "more than offered"
