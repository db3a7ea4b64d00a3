"""What `LLM` and `AsyncLLM` are made of. Knows nothing about HTTP."""
