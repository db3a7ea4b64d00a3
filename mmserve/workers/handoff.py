"""The KV of a sequence on its way from one language worker to another, under a lease.

Knows nothing about requests or steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mmserve.kv.store import KVExport
from mmserve.messages import Lease
from mmserve.tensors import tensors_of, to_numpy
from mmserve.transfer import LEASE_TTL_S, LeaseStore, open_lease
from mmserve.wire import Array, TypedArray


def publish_kv(export: KVExport, leases: LeaseStore, owner: str) -> Lease:
    arrays: dict[str, Array | TypedArray] = {
        "lengths": export.lengths,
        "order": export.order,
        "position": export.position,
        "k": to_numpy(export.k),
        "v": to_numpy(export.v),
    }
    return leases.publish(arrays, ttl_s=LEASE_TTL_S, owner=owner)


def open_kv(lease: Lease, directories: Sequence[Path]) -> KVExport:
    """Raises WireError where the lease is gone or holds something else."""
    arrays = open_lease(lease, directories)
    tensors = tensors_of(lease, arrays)
    return KVExport(
        lengths=arrays["lengths"].astype(np.int32, copy=False),
        order=arrays["order"].astype(np.int32, copy=False),
        position=arrays["position"].astype(np.int32, copy=False),
        k=tensors["k"],
        v=tensors["v"],
    )
