"""What a worker publishes with and reads with, by plane, and what it says of leases nobody came for."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from mmserve import messages as m
from mmserve.config import Transfer
from mmserve.messages import Role
from mmserve.queues import CurveKeys, make_keys
from mmserve.transfer import LeaseStore
from mmserve.workers.main import WorkerConfig, _evict, _open_plane
from tests.workers.fakes import FakeReporter


def config(directory: Path, keys: CurveKeys | None) -> WorkerConfig:
    return WorkerConfig(
        name="encode-0-1",
        roles=(Role.ENCODE,),
        endpoint="ipc:///run/x",
        directories=(str(directory),),
        model="m",
        transfer=Transfer(lease_ttl_s=5.0),
        keys=keys,
    )


@pytest.mark.parametrize("keys", [None, make_keys()], ids=["memory", "tcp"])
def test_what_one_worker_publishes_another_reads_on_either_plane(
    tmp_path: Path, keys: CurveKeys | None
) -> None:
    with ExitStack() as stack:
        ours, _ = _open_plane(config(tmp_path, keys), [tmp_path], stack)
        _, theirs = _open_plane(config(tmp_path, keys), [tmp_path], stack)
        lease = ours.publish({"x": np.arange(5)})
        assert lease.endpoint.startswith("tcp://127.0.0.1:") == (keys is not None)
        assert theirs.open(lease)["x"].tolist() == [0, 1, 2, 3, 4]
    assert not list(tmp_path.iterdir())


def test_what_nobody_read_in_time_is_evicted_and_told(tmp_path: Path) -> None:
    times = iter([0.0, 1.0, 2.0, 5.5, 8.0, 8.0])
    reporter = FakeReporter()
    with LeaseStore([tmp_path], ttl_s=5.0, clock=lambda: next(times)) as leases:
        first = leases.publish({"x": np.zeros(3)})
        second = leases.publish({"x": np.zeros(3)})
        for _ in range(4):
            _evict(leases, reporter)
        assert not Path(first.path).exists()
        assert not Path(second.path).exists()
    told = [event.lease_ids for event in reporter.of(m.LeasesEvicted)]
    assert told == [(first.lease_id,), (second.lease_id,)]
