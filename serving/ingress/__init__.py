"""The ingress deployment: the front door on Ray Serve, and the request router."""
