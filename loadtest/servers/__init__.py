"""Servers that a measurement starts, watches and stops."""
