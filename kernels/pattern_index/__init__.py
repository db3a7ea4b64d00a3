"""What an `AttentionIndex` is built from: which keys, diagonals, strides and blocks the queries look at.

One sequence at a time. Keys lie on an axis, in ascending `order` (an axis of one modality, for instance);
key_order int32 [S] says the order of each, None that key j has order j. A row sees keys up to its own order.
Query head h reads KV head h // (Hq / Hkv). Nothing waits for the device.
"""

from __future__ import annotations

from torch import Tensor

from mmserve.kernels.dispatch import backend_for
from mmserve.kernels.pattern_index import cpu, naive
from mmserve.kernels.pattern_index.naive import Columns, Probe, Residues

__all__ = ["Columns", "Probe", "Residues", "block_scores", "probe", "residue_scores", "select_columns"]


def probe(q: Tensor, k: Tensor, row_order: Tensor, key_order: Tensor | None, *, scale: float) -> Probe:
    """Column and diagonal sums of the attention of the last rows q [R, Hq, d], R up to 64, to k [S, Hkv, d].

    row_order int32 [R]. Diagonals suppose that the rows are the last R of the axis: slash[o] is the weight of
    keys o places before their row.
    """
    if backend_for(q.device) == "naive":
        if cpu.is_available(q, k):
            return cpu.probe(q, k, row_order, key_order, scale=scale)
        return naive.probe(q, k, row_order, key_order, scale=scale)
    # triton is imported only where it runs
    from mmserve.kernels.pattern_index import triton

    return triton.probe(q, k, row_order, key_order, scale=scale)


def residue_scores(vertical: Tensor, strides: Tensor, *, first: int, last: int) -> Residues:
    """For each stride int32 [C], the residue class of keys with the most mass, and its lift.

    vertical is fp32 [Hq, S]; columns before `first` (sink) and from `last` on (local band) do not count, and
    neither does the end of the axis that fills no whole stride. The lift, (mass of the class / mass of all) -
    1 / stride, is 0 for an even spread; raw mass would prefer small strides, mean mass their multiples.
    """
    if backend_for(vertical.device) == "naive":
        return naive.residue_scores(vertical, strides, first=first, last=last)
    from mmserve.kernels.pattern_index import triton

    return triton.residue_scores(vertical, strides, first=first, last=last)


def block_scores(
    q: Tensor,
    k: Tensor,
    row_order: Tensor,
    key_order: Tensor | None,
    *,
    block: int,
    key_block: int | None = None,
    scale: float,
) -> Tensor:
    """scale * mean of queries . mean of keys, block by block: fp32 [Hq, row blocks, key blocks].

    q [N, Hq, d], row_order int32 [N] ascending. Blocks have `block` rows and `key_block` keys, by default as
    many. -inf where no row of the block sees the first key.
    """
    if backend_for(q.device) == "naive":
        return naive.block_scores(q, k, row_order, key_order, block=block, key_block=key_block, scale=scale)
    from mmserve.kernels.pattern_index.blocks import triton

    return triton.block_scores(q, k, row_order, key_order, block=block, key_block=key_block, scale=scale)


def select_columns(
    q: Tensor,
    k: Tensor,
    row_order: Tensor,
    key_order: Tensor | None,
    key_end: Tensor,
    *,
    block: int,
    scale: float,
    alpha: float,
    sink: int,
    capacity: int,
) -> Columns:
    """For each block of rows, the keys whose score with the mean query is within alpha of the largest one.

    The largest is taken over all keys that the block's last row sees; kept are those of them in
    [sink, key_end[block]), key_end int32 [blocks], so that a sink run and a local run can be added without
    meeting a column. Past `capacity` columns the later ones are left out.
    """
    if backend_for(q.device) == "naive":
        select = naive.select_columns
    else:
        from mmserve.kernels.pattern_index.blocks import triton

        select = triton.select_columns
    return select(
        q, k, row_order, key_order, key_end,
        block=block, scale=scale, alpha=alpha, sink=sink, capacity=capacity,
    )  # fmt: skip
