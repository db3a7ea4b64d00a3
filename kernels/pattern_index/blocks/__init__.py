"""Scores of blocks: the half of `pattern_index` that reads all rows."""
