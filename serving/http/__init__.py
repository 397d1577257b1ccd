"""The HTTP front door, and wrappers around an ASGI app. Free of Ray and vLLM."""
