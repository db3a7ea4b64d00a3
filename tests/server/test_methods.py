"""The names that torch-free parts know are those that are registered."""

from __future__ import annotations

import subprocess
import sys

from mmserve.kv.base import POLICIES
from mmserve.methods import NAMES
from mmserve.pruning.base import PRUNERS


def test_the_names_are_those_of_the_registries() -> None:
    assert NAMES["prune"] == tuple(PRUNERS)
    assert NAMES["kv"] == tuple(POLICIES)


def test_the_api_process_loads_no_model_library() -> None:
    libraries = {"torch", "transformers", "triton", "PIL", "av", "decord", "gradio"}
    code = (
        f"import sys, mmserve.server.main\nsys.exit(' '.join(sorted({libraries!r} & set(sys.modules))) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
