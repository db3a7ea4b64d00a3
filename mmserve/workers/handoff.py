"""What travels between workers under a lease: the embeddings of media, and the KV of a sequence.

Knows nothing about requests or steps.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

import numpy as np
import torch
from torch import Tensor

from mmserve.config import WireDtype
from mmserve.encoders.tiers.storage import restore, shrink, storage_for
from mmserve.kv.codec import QuantizedExport, pages_of, parts_of
from mmserve.kv.store import KVExport
from mmserve.lease import Lease
from mmserve.tensors import tensors_of, to_numpy
from mmserve.transfer import LeaseReader, LeaseStore
from mmserve.wire import Array, TypedArray

_EMBEDDINGS: Final = frozenset({"embeddings", "scale"})
_PAGES: Final = "pages."  # begins the names of what belongs to quantized pages


def embedding_arrays(rows: Tensor, wire_dtype: WireDtype) -> dict[str, TypedArray]:
    """Rows [N, D] as they are published: as they are, rounded to bf16, or a byte a number and N scales.

    What that changes is bounded as `encoders.tiers.storage` says; bf16 moves x by at most |x| / 256.
    """
    if wire_dtype == "bf16":
        return {"embeddings": to_numpy(rows.to(torch.bfloat16))}
    if wire_dtype == "auto" or storage_for(rows, wire_dtype) == "raw":
        return {"embeddings": to_numpy(rows)}
    numbers, scale = shrink(rows, wire_dtype)
    return {"embeddings": to_numpy(numbers), "scale": to_numpy(scale)}


def open_embeddings(lease: Lease, reader: LeaseReader, like: Tensor) -> Tensor:
    """The rows of `embedding_arrays`, in the dtype and on the device of `like`."""
    # all of the lease is read, so that its crc is checked
    tensors = tensors_of(lease, reader.open(lease))
    rows, scale = tensors["embeddings"].to(like.device), tensors.get("scale")
    return rows.to(like.dtype) if scale is None else restore(rows, scale.to(like.device), like.dtype)


def columns_of(lease: Lease) -> Collection[str]:
    """What describes the rows: everything but the embeddings."""
    return [header.name for header in lease.arrays if header.name not in _EMBEDDINGS]


def publish_kv(export: KVExport | QuantizedExport, leases: LeaseStore, owner: str) -> Lease:
    arrays: dict[str, Array | TypedArray] = {
        "lengths": export.lengths,
        "order": export.order,
        "position": export.position,
        "k": to_numpy(export.k),
        "v": to_numpy(export.v),
    }
    if isinstance(export, QuantizedExport):
        arrays |= {_PAGES + name: to_numpy(part) for name, part in parts_of(export.pages).items()}
    return leases.publish(arrays, owner=owner)


def open_kv(lease: Lease, reader: LeaseReader) -> KVExport | QuantizedExport:
    """Which codec has written it is in its types."""
    arrays = reader.open(lease)
    tensors = tensors_of(lease, arrays)
    lengths, order, position = (
        arrays[name].astype(np.int32, copy=False) for name in ("lengths", "order", "position")
    )
    k, v = tensors["k"], tensors["v"]
    parts = {name.removeprefix(_PAGES): part for name, part in tensors.items() if name.startswith(_PAGES)}
    if not parts:
        return KVExport(lengths=lengths, order=order, position=position, k=k, v=v)
    return QuantizedExport(lengths=lengths, order=order, position=position, pages=pages_of(parts), k=k, v=v)
