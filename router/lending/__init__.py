"""Memory that replicas lend to each other: offers, leases in Redis, and who moves where."""
