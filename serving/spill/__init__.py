"""Requests that leave a replica without room and go on at another that lends some."""
