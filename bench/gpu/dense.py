"""Dense causal prefill of one sequence: our phased kernel with one run per tile, beside torch's kernels."""

from __future__ import annotations

import math
from statistics import median

import torch
from torch import Tensor

from mmserve.bench.gpu.measure import Session, random
from mmserve.bench.gpu.peers import Attend, flex, sdpa
from mmserve.bench.pairing import Metric
from mmserve.kernels.prefill_attention import AttentionIndex, dense_index, prefill_attention

Q_HEADS, KV_HEADS, WIDTH = 28, 4, 128
LENGTHS = tuple(1 << power for power in range(13, 18))  # 8K to 128K
SMOKE = (4, 2, 16, (48, 144))
CHECKED_ROWS = 128  # the first and as many of the last
SHARPNESS = 3  # of checked queries: the mean over many keys would be near 0, whatever is wrong
TOLERANCE = 2e-2  # two steps of bf16 at the size of the first rows
FLEX_GATE, BEST_GATE, BEST_GOAL = 1.0, 0.75, 0.9


def run(session: Session) -> None:
    sizes = SMOKE if session.is_smoke else (Q_HEADS, KV_HEADS, WIDTH, LENGTHS)
    q_heads, kv_heads, width, lengths = sizes
    for length in lengths:
        if not session.has_time(f"dense_{length}"):
            return
        q, k, v = (
            random((length, heads, width), session, seed)
            for seed, heads in enumerate((q_heads, kv_heads, kv_heads))
        )
        _measure(session, q, k, v)


def _measure(session: Session, q: Tensor, k: Tensor, v: Tensor) -> None:
    length, q_heads, width = q.shape
    name, scale, index = f"dense_{length}", width**-0.5, causal_index(q, k)

    def ours(queries: Tensor) -> Tensor:
        return prefill_attention(queries, k, v, index, scale=scale).out

    # the layout that the peers are made for
    swapped_k, swapped_v = (tensor.transpose(0, 1)[None].contiguous() for tensor in (k, v))

    def backends(queries: Tensor) -> dict[str, Attend]:
        return sdpa(queries.transpose(0, 1)[None].contiguous(), swapped_k, swapped_v, is_causal=True)

    sharp = q * SHARPNESS
    rows = torch.arange(length, device=q.device)
    rows = torch.cat([rows[:CHECKED_ROWS], rows[max(CHECKED_ROWS, length - CHECKED_ROWS) :]])
    found = ours(sharp)
    session.check(f"{name} against fp32", found[rows], causal(sharp, k, v, rows), TOLERANCE)
    whole = next(iter(backends(sharp).values()))()[0].transpose(0, 1)
    session.check(f"{name} against SDPA", found, whole, 2 * TOLERANCE)
    del found, whole, sharp
    peers = backends(q)
    best_of = tuple(peers)
    peers |= flex(q.transpose(0, 1)[None].contiguous(), swapped_k, swapped_v)
    taken = session.times(name, {"ours": lambda: ours(q), **peers})
    operations = 4 * q_heads * width * length * (length + 1) / 2
    rates = {side: [operations / s / 1e12 for s in seconds] for side, seconds in taken.items()}
    best = min((side for side in best_of if side in taken), key=lambda side: median(taken[side]))
    for side in (side for side in peers if side in rates):
        metric = Metric(
            name=f"{name}_vs_{side}",
            unit="TFLOP/s",
            more_is_better=True,
            gate=FLEX_GATE if side == "flex" else BEST_GATE if side == best else None,
            goal=BEST_GOAL if side == best else None,
        )
        session.add(metric, rates["ours"], rates[side])


def causal_index(q: Tensor, k: Tensor) -> AttentionIndex:
    tile_rows = 128
    if q.is_cuda:
        # triton is imported only where it runs
        from mmserve.kernels.prefill_attention.triton import default_tile_rows

        tile_rows = default_tile_rows(q.shape[2])
    return dense_index(
        [len(q)], [len(k)], q_heads=q.shape[1], kv_heads=k.shape[1], tile_rows=tile_rows, device=q.device
    )


def causal(q: Tensor, k: Tensor, v: Tensor, rows: Tensor) -> Tensor:
    """fp32 outputs of some rows, head by head."""
    group = q.shape[1] // k.shape[1]
    hidden = torch.arange(len(k), device=k.device) > rows[:, None]
    outs = []
    for head in range(q.shape[1]):
        scores = q[rows, head].float() @ k[:, head // group].float().T / math.sqrt(q.shape[2])
        weights = scores.masked_fill_(hidden, -torch.inf).softmax(-1)
        outs.append(weights @ v[:, head // group].float())
    return torch.stack(outs, dim=1)
