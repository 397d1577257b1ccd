"""Our selections against kvpress', an independent implementation, on the same prompts."""
