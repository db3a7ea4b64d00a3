"""The least time a decode step can take: every weight and every cached key and value is read once.

Knows nothing about how a step is computed.
"""

from __future__ import annotations

import time

import torch

from mmserve.models.decoder import DecoderConfig

PROBE_BYTES = 1 << 30
PROBES = 20


def kv_bytes_per_token(config: DecoderConfig, element_bytes: int) -> int:
    return config.layers * 2 * config.kv_heads * config.head_dim * element_bytes


def step_bytes(config: DecoderConfig, batch: int, context: int, element_bytes: int) -> int:
    """What one step of `batch` requests, each with `context` tokens before it, has to read."""
    hidden, head = config.hidden_size, config.head_dim
    attention = hidden * head * (2 * config.heads + 2 * config.kv_heads)
    layer = attention + 3 * hidden * config.intermediate_size
    weights = config.layers * layer + config.vocab_size * hidden  # the head reads all of its rows
    return weights * element_bytes + batch * context * kv_bytes_per_token(config, element_bytes)


def copy_bandwidth() -> float:
    """Bytes per second that the GPU's memory reads and writes in its best of several large copies."""
    source = torch.empty(PROBE_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    times = []
    for _ in range(PROBES):
        torch.cuda.synchronize()
        started_at = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started_at)
    del source, target
    torch.cuda.empty_cache()
    return 2 * PROBE_BYTES / min(times)
