"""Prompt layout per model family: placeholders, order and RoPE positions. Pure Python and numpy."""

from mmserve.models.layout.base import Rows, Walk, expand

__all__ = ["Rows", "Walk", "expand"]
