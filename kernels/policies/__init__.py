"""Which entries of a prompt's cache are kept: scorers, layer budgets, head allocations, presets."""
