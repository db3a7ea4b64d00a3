"""What a vision encoder gives: embeddings to splice into the prompt, and how salient each one is.

Knows nothing about files, preprocessing or caches.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor


class Encoded(NamedTuple):
    """T frames of N tokens. Saliency is the attention a token received in the tower's last used layer."""

    embeddings: Tensor  # [T, N, D]
    saliency: Tensor  # fp32 [T, N]


class EncodedImage(NamedTuple):
    """One image as it stands in the prompt; newline rows have no saliency."""

    embeddings: Tensor  # [M, D]
    saliency: Tensor  # fp32 [M]
    is_newline: Tensor  # bool [M]


class Features(NamedTuple):
    """P crops of G x G patches as the projector left them."""

    rows: Tensor  # [P, G * G, D]
    saliency: Tensor  # fp32 [P, G * G]


class VisionEncoder(Protocol):
    @property
    def newline(self) -> Tensor:
        """The embedding [D] that follows the last frame of a video."""
        ...

    def features(self, pixels: Tensor) -> Features:
        """Encode preprocessed crops [P, 3, S, S]; what becomes of one does not depend on the others."""
        ...

    def frames(self, features: Features) -> Encoded:
        """Crops that are frames of a video."""
        ...

    def pack(self, features: Features, original_size: tuple[int, int]) -> EncodedImage:
        """The crops of one image, the whole image first; `original_size` is (height, width)."""
        ...

    def newline_rows(self, original_size: tuple[int, int], crops: int) -> Tensor:
        """Which rows of an image of so many crops are newlines, bool [M]."""
        ...
