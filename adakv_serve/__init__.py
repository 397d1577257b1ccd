"""Holds the packages whose own names are too common for other people's environments.

In a checkout they are links to the folders `evals`, `kernels`, `loadtest`, `router` and `serving`.
"""
