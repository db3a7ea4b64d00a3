"""One decode step's attention over pages in random order, as a share of what the memory delivers.

Then the same over quantized pages, beside itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mmserve.attention.cuda import INTERPRETED_SPLITS, decode_attention
from mmserve.bench.gpu.codec import codecs, filled
from mmserve.bench.gpu.measure import Run, Session, random
from mmserve.bench.gpu.peers import sdpa
from mmserve.bench.pairing import Metric
from mmserve.kernels.dispatch import backend_for
from mmserve.kernels.kv_codec import QuantizedPages
from mmserve.kernels.paged_decode import naive_pages
from mmserve.kernels.paged_decode.naive_pages import PageScales
from mmserve.kv.store import PageStore

SHARPNESS = 3  # of checked queries: the mean over many keys would be near 0, whatever is wrong
TOLERANCE = 1e-2
QUANTIZED_TOLERANCE = 4e-2  # queries times scales of channels are rounded once more
CHECKED = 2  # sequences
GATE, INT4_GATE = 0.85, 2.5
GATED = "int4_channel"  # KIVI's layout; the other int4 has less to read


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    batch: int = 64
    context: int = 32768
    q_heads: int = 28
    kv_heads: int = 4
    width: int = 128
    page_size: int = 32


SMOKE = Sizes(batch=3, context=64, q_heads=4, kv_heads=2, width=16, page_size=16)


def run(session: Session) -> None:
    sizes = SMOKE if session.is_smoke else Sizes()
    name = f"decode_{sizes.batch}x{sizes.context}"
    pages_per_head = sizes.context // sizes.page_size
    store = PageStore(
        sizes.batch * sizes.kv_heads * pages_per_head,
        sizes.page_size,
        sizes.width,
        session.dtype,
        str(session.device),
    )
    for pages, seed in ((store.k, 1), (store.v, 2)):
        pages.normal_(generator=torch.Generator(session.device).manual_seed(seed))
    order = torch.randperm(len(store.k), generator=torch.Generator().manual_seed(3), dtype=torch.int32)
    tables = order.view(sizes.batch, sizes.kv_heads, pages_per_head).to(session.device)
    lengths = torch.full_like(tables[..., 0], sizes.context).contiguous()
    q = random((sizes.batch, sizes.q_heads, sizes.width), session, 0)

    found = decode_attention(q * SHARPNESS, store, tables, lengths)
    _check(session, name, found, q, store.k, store.v, None, tables, lengths)
    quantized: dict[str, Run] = {}
    for codec in codecs(session):
        small = filled(codec, store.k, store.v)
        found = _quantized_attention(q * SHARPNESS, small, tables, lengths)
        scales = small.scales
        _check(session, f"{name}_{codec.name}", found, q, small.k, small.v, scales, tables, lengths)
        quantized[codec.name] = partial(_quantized_attention, q, small, tables, lengths)
    k, v = (pages[tables.long()].flatten(2, 3) for pages in (store.k, store.v))
    peers = sdpa(q[:, :, None], k, v, is_causal=False)
    ours = partial(decode_attention, q, store, tables, lengths)
    taken = session.times(name, {"ours": ours, **quantized, **peers})

    moved = 2 * sizes.batch * sizes.kv_heads * sizes.context * sizes.width * store.k.itemsize
    rates = {side: [moved / s / 1e9 for s in seconds] for side, seconds in taken.items()}
    metric = Metric(name=f"{name}_vs_bandwidth", unit="GB/s", more_is_better=True, gate=GATE)
    bandwidth = [session.bandwidth() / 1e9] * len(rates["ours"])
    session.add(metric, rates["ours"], bandwidth, peer_is="measured copy bandwidth")
    for side in (side for side in peers if side in rates):
        metric = Metric(name=f"{name}_vs_{side}", unit="GB/s", more_is_better=True)
        session.add(metric, rates["ours"], rates[side])
    ms = {side: [s * 1e3 for s in seconds] for side, seconds in taken.items()}
    for side in quantized:
        gate = INT4_GATE if side == GATED else None
        metric = Metric(name=f"{name}_{side}", unit="ms", gate=gate)
        session.add(metric, ms[side], ms["ours"], peer_is=f"the same on pages of {session.dtype}")


def _quantized_attention(q: Tensor, pages: QuantizedPages, tables: Tensor, lengths: Tensor) -> Tensor:
    call, scale = (q, pages.k, pages.v, tables, lengths), q.shape[-1] ** -0.5
    if backend_for(q.device) == "naive":
        return naive_pages.paged_decode(*call, scale=scale, scales=pages.scales).out.to(q.dtype)
    # triton is imported only where it runs
    from mmserve.kernels.paged_decode import triton

    splits = None if q.is_cuda else INTERPRETED_SPLITS
    return triton.paged_decode(*call, scale=scale, scales=pages.scales, splits=splits).out


def _check(
    session: Session,
    name: str,
    found: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scales: PageScales | None,
    tables: Tensor,
    lengths: Tensor,
) -> None:
    """Some sequences against the oracle, which reads the same pages."""
    some = slice(CHECKED)
    expected = naive_pages.paged_decode(
        q[some] * SHARPNESS, k, v, tables[some], lengths[some], scale=q.shape[-1] ** -0.5, scales=scales
    ).out
    tolerance = TOLERANCE if scales is None else QUANTIZED_TOLERANCE
    session.check(f"{name} against fp32", found[some], expected, tolerance)
