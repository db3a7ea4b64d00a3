"""Vision encoders and the cache of their results."""
