"""tensors.py: every dtype crosses a lease bit for bit, without a copy on the reader's side."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mmserve.errors import WireError
from mmserve.tensors import tensors_of, to_numpy, to_torch
from mmserve.transfer import LeaseStore, open_lease
from mmserve.wire import array_from, describe

DTYPES = [
    torch.uint8,
    torch.int8,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.float32,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensor_crosses_a_lease(dtype: torch.dtype, tmp_path: Path) -> None:
    tensor = torch.linspace(-3, 50, 24).to(dtype).reshape(2, 3, 4).transpose(0, 2)
    with LeaseStore([tmp_path]) as store:
        lease = store.publish({"x": to_numpy(tensor), "none": to_numpy(tensor[:0])}, ttl_s=30)
        tensors = tensors_of(lease, open_lease(lease, [tmp_path]))
        assert tensors["x"].dtype == dtype
        assert torch.equal(tensors["x"].contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8))
        assert tensors["none"].shape == (0, 3, 2)


def test_writing_to_a_leased_tensor_stays_private(tmp_path: Path) -> None:
    with LeaseStore([tmp_path]) as store:
        lease = store.publish({"x": to_numpy(torch.ones(8))}, ttl_s=30)
        arrays = open_lease(lease, [tmp_path])
        tensor = tensors_of(lease, arrays)["x"]
        assert tensor.data_ptr() == arrays["x"].ctypes.data
        tensor.zero_()
        assert tensors_of(lease, open_lease(lease, [tmp_path]))["x"].sum() == 8


def test_tensor_crosses_a_frame() -> None:
    value = to_numpy(torch.tensor([1.5, -2], dtype=torch.bfloat16))
    header = describe("x", value)
    assert to_torch(array_from(header, value.array.tobytes()), header).tolist() == [1.5, -2]


def test_tensor_that_cannot_travel_is_refused() -> None:
    with pytest.raises(WireError):
        to_numpy(torch.zeros(2, dtype=torch.complex64))
