"""The fleet page: what the replicas hold and do, live, and a box to try a prompt."""
