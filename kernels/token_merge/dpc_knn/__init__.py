"""Clustering by density peaks: the larger half of `token_merge` on a GPU."""
