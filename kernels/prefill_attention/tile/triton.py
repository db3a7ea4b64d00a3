"""One tile of an `AttentionIndex` on a GPU: its runs, blocks and columns under one online softmax.

Knows nothing about launches. What belongs together goes through the functions as a tuple:

    rows  which places of the tile are rows, their orders, the earliest of these
    storage  K, V, where the axis begins, orders, slots and pages of its keys, elements from key to key
    described  descriptors of K and V, or None, and the head's first channel in them
    state  of the softmax: largest score, sum of weights, weighted sum of values
    factors  scale of the scores and threshold of skipped weights, both for powers of two
"""

from __future__ import annotations

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _load_valid(ptr, valid):
    return tl.load(ptr) if valid is None else tl.load(ptr, mask=valid, other=0)


@triton.jit
def _load_keys(storage, key, valid, PAGE_SIZE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """K and V of keys of one axis; a key that is not valid reads as 0, whatever its memory holds."""
    k_ptr, v_ptr, axis, _, slot_ptr, table_ptr, stride_k, stride_v = storage
    channel = tl.arange(0, BLOCK_D)
    if slot_ptr is not None:
        key = _load_valid(slot_ptr + axis + key, valid)
    if PAGE_SIZE > 0:
        page = _load_valid(table_ptr + key // PAGE_SIZE, valid)
        row = page.to(tl.int64) * PAGE_SIZE + key % PAGE_SIZE
    else:
        row = axis + key
    mask = None
    if valid is not None:
        mask = valid[:, None]
    if BLOCK_D != D:
        mask = (channel < D)[None, :] if mask is None else mask & (channel < D)[None, :]
    k = _load_valid(k_ptr + row[:, None] * stride_k + channel[None, :], mask)
    v = _load_valid(v_ptr + row[:, None] * stride_v + channel[None, :], mask)
    return k, v


@triton.jit
def _visible(rows, storage, key, valid):
    """Which rows see which keys."""
    axis, order_ptr = storage[2], storage[3]
    if order_ptr is not None:
        key = _load_valid(order_ptr + axis + key, valid)
    seen = key[None, :] <= rows[1][:, None]
    if valid is not None:
        seen &= valid[None, :]
    return seen


@triton.jit
def _attend(q, k, v, visible, rows, state, factors, SKIP: tl.constexpr, PRECISION: tl.constexpr):
    """One step of the online softmax; `visible` None means that every row sees every key."""
    m, total, acc = state
    scale_log2, skip_log2 = factors
    s = tl.dot(q, k.T, input_precision=PRECISION) * scale_log2
    if visible is not None:
        s = tl.where(visible, s, float("-inf"))
    top = tl.max(s, 1)
    m_new = tl.maximum(m, top)
    # a row that has seen nothing yet must not subtract -inf from -inf
    m_safe = m_new if visible is None else tl.where(m_new > float("-inf"), m_new, 0.0)
    if SKIP:
        # no weight of this block exceeds the threshold times the largest of its row so far
        if tl.max(tl.where(rows[0] & (top > m + skip_log2), 1, 0), 0) > 0:
            alpha = tl.exp2(m - m_safe)
            p = tl.exp2(s - m_safe[:, None])
            total = total * alpha + tl.sum(p, 1)
            acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
            m = m_new
    else:
        alpha = tl.exp2(m - m_safe)
        p = tl.exp2(s - m_safe[:, None])
        total = total * alpha + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
        m = m_new
    return m, total, acc


@triton.jit
def _attend_gathered(
    q, rows, storage, key, valid, state, factors, MASKED: tl.constexpr,
    PAGE_SIZE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    SKIP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A step of keys that lie anywhere; unless MASKED, every row sees all of them."""
    k, v = _load_keys(storage, key, valid, PAGE_SIZE, D, BLOCK_D)
    seen = None
    if MASKED:
        seen = _visible(rows, storage, key, valid)
    return _attend(q, k, v, seen, rows, state, factors, SKIP, PRECISION)


@triton.jit
def _attend_described(
    q, rows, storage, described, start, state, factors, MASKED: tl.constexpr,
    BLOCK_N: tl.constexpr, SKIP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A step of keys that follow each other, loaded by descriptors."""
    k_desc, v_desc, channel = described
    at = (storage[2] + start).to(tl.int32)
    k, v = k_desc.load([at, channel]), v_desc.load([at, channel])
    seen = None
    if MASKED:
        seen = _visible(rows, storage, start + tl.arange(0, BLOCK_N), None)
    return _attend(q, k, v, seen, rows, state, factors, SKIP, PRECISION)


@triton.jit
def load_rows(
    q_ptr, tile, rows_ptr, row_order_ptr, head, heads,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The tile's queries [BLOCK_M, BLOCK_D] and its `rows`."""
    member, channel = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    real = member < tl.load(tile + 3)
    row = tl.load(rows_ptr + tl.load(tile + 2) + member, mask=real, other=0)
    row_order = tl.load(row_order_ptr + row, mask=real, other=0)
    # every row sees the keys up to the order of the earliest: no mask there
    earliest = tl.min(tl.where(real, row_order, 2147483647), 0)
    row_at = row.to(tl.int64) * heads + head
    inside = real[:, None] & (channel < D)[None, :]
    q = tl.load(q_ptr + row_at[:, None] * D + channel[None, :], mask=inside, other=0.0)
    return q, (real, row_order, earliest)


@triton.jit
def attend_runs(
    q, rows, storage, described, tile, runs_ptr, state, factors,
    BLOCK_N: tl.constexpr, PAGE_SIZE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    SKIP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All runs of the tile, the part that every row sees first."""
    earliest, order_ptr, k_desc = rows[2], storage[3], described[0]
    place = tl.arange(0, BLOCK_N)
    first, count = tl.load(tile + 4), tl.load(tile + 5)
    for run in range(first, first + count):
        start, stride = tl.load(runs_ptr + run * 3), tl.load(runs_ptr + run * 3 + 1)
        length = tl.load(runs_ptr + run * 3 + 2)
        if order_ptr is None:
            free = tl.where(earliest < start, 0, tl.minimum((earliest - start) // stride + 1, length))
        else:
            free = length
        whole = free // BLOCK_N * BLOCK_N
        direct = 0
        if k_desc is not None:
            direct = tl.where(stride == 1, whole, 0)
            for at in range(0, direct, BLOCK_N):
                state = _attend_described(
                    q, rows, storage, described, start + at, state, factors, order_ptr is not None,
                    BLOCK_N, SKIP, PRECISION,
                )  # fmt: skip
        for at in range(direct, whole, BLOCK_N):
            state = _attend_gathered(
                q, rows, storage, start + (at + place) * stride, None, state, factors, order_ptr is not None,
                PAGE_SIZE, D, BLOCK_D, SKIP, PRECISION,
            )  # fmt: skip
        # the diagonal and the ragged end
        for at in range(whole, length, BLOCK_N):
            state = _attend_gathered(
                q, rows, storage, start + (at + place) * stride, at + place < length, state, factors, True,
                PAGE_SIZE, D, BLOCK_D, SKIP, PRECISION,
            )  # fmt: skip
    return state


@triton.jit
def attend_blocks(
    q, rows, storage, described, tile, blocks_ptr, state, factors, BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr, PAGE_SIZE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    SKIP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All blocks of the tile, each in steps that divide it."""
    k_desc = described[0]
    PARTS: tl.constexpr = BLOCK_SIZE // BLOCK_N
    first, count = tl.load(tile + 6), tl.load(tile + 7)
    for at in range(0, count * PARTS):
        start = tl.load(blocks_ptr + first + at // PARTS) * BLOCK_SIZE + at % PARTS * BLOCK_N
        if k_desc is not None:
            state = _attend_described(
                q, rows, storage, described, start, state, factors, True, BLOCK_N, SKIP, PRECISION
            )
        else:
            state = _attend_gathered(
                q, rows, storage, start + tl.arange(0, BLOCK_N), None, state, factors, True,
                PAGE_SIZE, D, BLOCK_D, SKIP, PRECISION,
            )  # fmt: skip
    return state


@triton.jit
def attend_columns(
    q, rows, storage, tile, columns_ptr, state, factors,
    BLOCK_N: tl.constexpr, PAGE_SIZE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    SKIP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All single keys of the tile."""
    place = tl.arange(0, BLOCK_N)
    first, count = tl.load(tile + 8), tl.load(tile + 9)
    for at in range(0, count, BLOCK_N):
        valid = at + place < count
        key = tl.load(columns_ptr + first + at + place, mask=valid, other=0)
        state = _attend_gathered(
            q, rows, storage, key, valid, state, factors, True, PAGE_SIZE, D, BLOCK_D, SKIP, PRECISION
        )
    return state


@triton.jit
def store_rows(
    out_ptr, lse_ptr, tile, rows_ptr, head, heads, state,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Outputs and LSE of the tile's rows, back where the queries came from."""
    m, total, acc = state
    member, channel = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    # volatile: read again here, so that no registers hold the addresses throughout
    written = member < tl.load(tile + 3, volatile=True)
    row = tl.load(rows_ptr + tl.load(tile + 2) + member, mask=written, other=0, volatile=True)
    row_at = row.to(tl.int64) * heads + head
    # a row that saw nothing: 0 with LSE -inf
    total = tl.where(total > 0, total, 1.0)
    out = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
    inside = written[:, None] & (channel < D)[None, :]
    tl.store(out_ptr + row_at[:, None] * D + channel[None, :], out, mask=inside)
    tl.store(lse_ptr + row_at, (m + tl.log2(total)) * LN2, mask=written)
