"""Where kept entries lie: page tables, their growth, and reading and writing pages."""
