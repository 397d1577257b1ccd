"""Faults of a deployment's processes and clients, and requests with known answers beside them."""
