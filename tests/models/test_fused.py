"""The fused forward pass against the plain one, with the oracles and with the kernels interpreted."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from mmserve.attention.cuda import CudaAttention
from mmserve.attention.paged import PagedAttention, SequenceRows
from mmserve.kernels.dispatch import VARIABLE
from mmserve.kv.store import PageStore
from mmserve.kv.table import PageTable
from mmserve.models.decoder import TextDecoder
from mmserve.models.fused import fused_forward
from tests.workers.fakes import tiny_decoder

ROWS = 7


def make_decoder(*, qk_norm: bool) -> TextDecoder:
    torch.manual_seed(0)
    decoder = TextDecoder(replace(tiny_decoder().config, qk_norm=qk_norm)).eval().requires_grad_(False)
    for name, weight in decoder.named_parameters():
        torch.nn.init.uniform_(weight, 0.5 if "norm" in name else -0.5, 1.5 if "norm" in name else 0.5)
    return decoder


@pytest.mark.parametrize("kernels", ["naive", "interpret"])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_both_forward_passes_agree(qk_norm: bool, kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, kernels)
    decoder = make_decoder(qk_norm=qk_norm)
    config = decoder.config
    x = torch.randn(ROWS, config.hidden_size, generator=torch.Generator().manual_seed(1))
    places = np.arange(3, 3 + ROWS, dtype=np.int32)
    found, pages = [], []
    for kind in (PagedAttention, CudaAttention):
        table = PageTable(config.layers, config.kv_heads, 20, 4)
        store = PageStore(20, 4, config.head_dim)
        table.append("a", places, places)
        attention = kind(table, store, [SequenceRows("a", 0, ROWS)])
        if isinstance(attention, CudaAttention):
            found.append(fused_forward(decoder, x, torch.from_numpy(places), attention.attend_products))
        else:
            found.append(decoder(x, torch.from_numpy(places), attention.attend))
        pages.append(torch.stack([store.k, store.v]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(pages[1], pages[0], rtol=1e-4, atol=1e-5)
