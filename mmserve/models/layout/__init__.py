"""Prompt layout per model family: placeholders, order and RoPE positions. Pure Python and numpy."""

from mmserve.models.layout.base import expand, expand_tokens
from mmserve.models.layout.llava_onevision import survivors

__all__ = ["expand", "expand_tokens", "survivors"]
