"""A deployment under a mixed load for hours: what its processes hold, and whether it grows."""
