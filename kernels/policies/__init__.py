"""Policies that choose which entries of a cache stay: scorer, layer budget, head allocation."""
