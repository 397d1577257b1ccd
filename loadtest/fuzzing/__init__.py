"""Requests made to break a deployment, how they are sent, and what answers they may get."""
