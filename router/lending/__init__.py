"""Memory that replicas lend to each other: offers, leases in Redis, and plans of moves."""
