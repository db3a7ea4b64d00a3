"""Where embeddings are kept beyond a worker's own memory. Knows nothing about models, requests or media."""
