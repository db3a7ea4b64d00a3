"""KV cache: who owns which page (`table`, numpy), what is in it (`store`), and what may leave (policies)."""
