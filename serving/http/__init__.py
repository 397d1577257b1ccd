"""The HTTP front door and what it puts around an ASGI app. No Ray, no vLLM."""
