"""Visual-token reduction after the encoder: `base` holds the contract and the registry, each method a file.

Knows nothing about models, prompts, caches or processes.
"""
