"""Locust users, their options and the load that they share."""
