"""Prompt layout per model family: placeholders, order and RoPE positions. Pure Python and numpy."""

from mmserve.models.layout.base import Rows, Walk, expand
from mmserve.models.layout.llava_onevision import positions

__all__ = ["Rows", "Walk", "expand", "positions"]
