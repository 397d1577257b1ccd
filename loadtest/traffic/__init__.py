"""What load tests ask and when: texts, workloads, traces."""
