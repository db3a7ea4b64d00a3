"""One KV policy per file."""
