"""The cache that a deployment asks for, with its tiers open. Knows nothing about how it is used."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from mmserve.config import EmbeddingTiers
from mmserve.encoders.cache import EmbeddingCache
from mmserve.encoders.tiers.base import Tier
from mmserve.encoders.tiers.record import RowFormat


def open_cache(capacity_bytes: int, settings: EmbeddingTiers, row: Tensor) -> EmbeddingCache:
    """A cache of embeddings that are like `row` [D].

    ConfigError where a tier can never work; a server that is down just now is no such case.
    """
    return EmbeddingCache(
        capacity_bytes,
        tiers=_open_tiers(settings),
        rows=RowFormat(len(row), row.dtype),
        storage="raw" if settings.storage == "auto" else settings.storage,
        device=row.device,
        # on a CPU it would hold the same bytes twice
        host_bytes=(settings.host_bytes or 0) if row.device.type == "cuda" else 0,
    )


def _open_tiers(settings: EmbeddingTiers) -> list[Tier]:
    tiers: list[Tier] = []
    # each library is loaded only where its tier is named
    if settings.disk_path is not None:
        from mmserve.encoders.tiers.disk import DiskTier

        tiers.append(DiskTier(Path(settings.disk_path).expanduser(), settings.disk_bytes))
    if settings.redis_url is not None:
        from mmserve.encoders.tiers.shared import SharedTier

        url, timeout_s = settings.redis_url, settings.redis_timeout_s
        tiers.append(SharedTier(url, timeout_s=timeout_s, expire_s=settings.redis_expire_s))
    return tiers
