"""Attention of one new row per sequence over its paged KV."""
