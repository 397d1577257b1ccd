"""The ingress deployment: the front door on Ray Serve, and its request router."""
