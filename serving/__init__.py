"""The Ray Serve application: OpenAI over HTTP in front of vLLM engines."""
