"""Engines that a measurement runs without HTTP."""
