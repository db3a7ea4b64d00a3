"""How a language worker shares out its memory for KV, by what it does and the type of its pages.

Knows nothing about where the number of bytes comes from.
"""

from __future__ import annotations

import torch

from mmserve.engine.pages import MAX_RUNNING
from mmserve.engine.quantized import QuantizedRunner
from mmserve.engine.runner import Runner
from mmserve.errors import ConfigError
from mmserve.kernels.kv_codec.pages import PAGE_TYPES, Kind
from mmserve.kv.base import DEFAULT_BUDGET
from mmserve.kv.codec import page_bytes as quantized_page_bytes
from mmserve.kv.quantized import SHORT_SLOTS, QuantizedStore, places_and_pages
from mmserve.kv.store import PageStore, page_bytes
from mmserve.kv.table import PageTable
from mmserve.models.decoder import TextDecoder

KINDS: dict[str, Kind] = {kind: kind for kind in PAGE_TYPES}


def make_runner(
    decoder: TextDecoder,
    *,
    kv_dtype: str,
    memory: int,
    page_size: int,
    dtype: torch.dtype,
    device: str,
    prefills: bool,
    decodes: bool,
    kv_budget: float | None = 1.0,
) -> Runner:
    """A runner with `memory` bytes of pages; raises ConfigError when that is too little.

    Quantized pages hold answers, pages of floats prompts. A worker that does both gives half of its memory
    to each: the share of prompts is also what the prefix cache has. `kv_budget` is what the deployment's KV
    policy keeps: the smaller, the more sequences quantized pages are for.
    """
    kind, where = KINDS.get(kv_dtype), torch.device(device)
    own = torch.bfloat16 if kv_dtype == "bf16" else dtype
    _check(decoder, kind if decodes else None, memory, page_size, own, prefills=prefills)
    if kind is None:
        return Runner(decoder, *_floats(decoder, memory, page_size, own, device), where)
    if not decodes:
        return Runner(decoder, *_floats(decoder, memory, page_size, own, device), where, kind)
    share = memory // 2 if prefills else memory
    quantized = _quantized(decoder, kind, share, page_size, dtype, device, _kept(kv_budget))
    if prefills:
        table, store = _floats(decoder, memory - share, page_size, own, device)
    else:
        table, store = _pages(decoder, 0, page_size, own, device)
    return QuantizedRunner(decoder, table, store, where, quantized)


def _floats(
    decoder: TextDecoder, memory: int, page_size: int, dtype: torch.dtype, device: str
) -> tuple[PageTable, PageStore]:
    one = page_bytes(page_size=page_size, head_dim=decoder.config.head_dim, dtype=dtype)
    return _pages(decoder, memory // one, page_size, dtype, device)


def _pages(
    decoder: TextDecoder, pages: int, page_size: int, dtype: torch.dtype, device: str
) -> tuple[PageTable, PageStore]:
    config = decoder.config
    table = PageTable(config.layers, config.kv_heads, pages, page_size)
    return table, PageStore(pages, page_size, config.head_dim, dtype, device)


def _quantized(
    decoder: TextDecoder,
    kind: Kind,
    memory: int,
    page_size: int,
    dtype: torch.dtype,
    device: str,
    kept: float,
) -> QuantizedStore:
    config = decoder.config
    heads = config.layers * config.kv_heads
    places, pages = places_and_pages(
        memory, MAX_RUNNING, kind, heads, page_size, config.head_dim, dtype, kept=kept
    )
    table = PageTable(config.layers, config.kv_heads, pages, page_size)
    return QuantizedStore(kind, table, places, config.head_dim, dtype, device)


def _kept(kv_budget: float | None) -> float:
    """The share of its slots that a short sequence keeps."""
    budget = DEFAULT_BUDGET if kv_budget is None else kv_budget
    return min(budget if budget <= 1 else budget / SHORT_SLOTS, 1.0)


def _check(
    decoder: TextDecoder,
    answers: Kind | None,
    memory: int,
    page_size: int,
    dtype: torch.dtype,
    *,
    prefills: bool,
) -> None:
    """A page of every head is the least; of quantized answers the newest page too."""
    config = decoder.config
    page = page_bytes(page_size=page_size, head_dim=config.head_dim, dtype=dtype)
    if answers is not None:
        page += quantized_page_bytes(answers, page_size, config.head_dim)
        page *= 2 if prefills else 1
    least = config.layers * config.kv_heads * page
    if memory < least:
        raise ConfigError(
            f"Expected kv_memory of at least {least} bytes, a page of every head, but got {memory}"
        )
