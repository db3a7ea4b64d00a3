"""The line that `mmserve ask` ends with."""

from __future__ import annotations

import msgspec
import pytest

from mmserve.ask import summary
from mmserve.request import Usage
from tests.fake_llm import completion

MIB = 1 << 20


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        (
            Usage(visual_tokens=100, visual_tokens_kept=100, visual_tokens_layer_mean=100.0),
            "100 → 100 visual tokens | KV 8.0 → 2.0 MiB",
        ),
        # behind the tower and inside the model; KV is told against that of all tokens
        (
            Usage(visual_tokens=100, visual_tokens_kept=40, visual_tokens_layer_mean=23.4),
            "100 → 40 visual tokens (23 per layer) | KV 8.0 → 2.0 MiB",
        ),
        # carriers: what lasts is less than what layers see
        (
            Usage(visual_tokens=100, visual_tokens_kept=5, visual_tokens_layer_mean=100.0),
            "100 → 5 visual tokens | KV 8.0 → 2.0 MiB",
        ),
    ],
    ids=["dense", "inner", "carriers"],
)
def test_the_summary_tells_what_became_of_tokens_and_kv(usage: Usage, expected: str) -> None:
    sizes = {"kv_bytes": 2 * MIB, "kv_bytes_uncompressed": 3 * MIB, "kv_bytes_dense": 8 * MIB}
    done = msgspec.structs.replace(completion("a"), usage=msgspec.structs.replace(usage, **sizes))
    assert expected in summary(done)


def test_the_summary_tells_how_much_of_dense_attention_was_computed() -> None:
    done = completion("a")
    usage = msgspec.structs.replace(done.usage, attention_density=(1.0, 0.5, 0.3))
    sparse = msgspec.structs.replace(done.methods, attention="a_shape")
    assert "attention" not in summary(msgspec.structs.replace(done, usage=usage))
    assert "| attention 60 % |" in summary(msgspec.structs.replace(done, usage=usage, methods=sparse))
