"""Attention over paged KV, dense and sparse."""
