"""One decode step's attention over pages in random order, as a share of what the memory delivers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmserve.attention.cuda import decode_attention
from mmserve.bench.gpu.measure import Session, random
from mmserve.bench.gpu.peers import sdpa
from mmserve.bench.pairing import Metric
from mmserve.kernels.paged_decode import naive_pages
from mmserve.kv.store import PageStore

SHARPNESS = 3  # of checked queries: the mean over many keys would be near 0, whatever is wrong
TOLERANCE = 1e-2
CHECKED = 2  # sequences
GATE = 0.85


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    batch: int = 64
    context: int = 32768
    q_heads: int = 28
    kv_heads: int = 4
    width: int = 128
    page_size: int = 32


SMOKE = Sizes(batch=3, context=64, q_heads=4, kv_heads=2, width=16, page_size=8)


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

    def ours() -> Tensor:
        return decode_attention(q, store, tables, lengths)

    some, sharp = slice(CHECKED), q * SHARPNESS
    found = decode_attention(sharp, store, tables, lengths)[some]
    expected = naive_pages.paged_decode(
        sharp[some], store.k, store.v, tables[some], lengths[some], scale=sizes.width**-0.5
    ).out
    session.check(f"{name} against fp32", found, expected, TOLERANCE)
    k, v = (pages[tables.long()].flatten(2, 3) for pages in (store.k, store.v))
    peers = sdpa(q[:, :, None], k, v, is_causal=False)
    taken = session.times(name, {"ours": ours, **peers})
    moved = 2 * sizes.batch * sizes.kv_heads * sizes.context * sizes.width * store.k.itemsize
    rates = {side: [moved / s / 1e9 for s in seconds] for side, seconds in taken.items()}
    metric = Metric(name=f"{name}_vs_bandwidth", unit="GB/s", more_is_better=True, gate=GATE)
    bandwidth = [session.bandwidth() / 1e9] * session.rounds
    session.add(metric, rates["ours"], bandwidth, peer_is="measured copy bandwidth")
    for side in (side for side in peers if side in rates):
        metric = Metric(name=f"{name}_vs_{side}", unit="GB/s", more_is_better=True)
        session.add(metric, rates["ours"], rates[side])
