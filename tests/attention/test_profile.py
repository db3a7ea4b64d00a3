"""Attention profiles: what is written is read, what is wrong is refused; and the search that finds them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmserve.attention.costs import COUNTED, measure
from mmserve.attention.patterns.mminference import MMInference
from mmserve.attention.profile import AttentionProfile, Head, Inputs, Lines, load_profile, read_profile
from mmserve.attention.search import Layer, Plan, Recorded, search
from mmserve.errors import BadRequest, ConfigError
from mmserve.kernels.prefill_attention import dense_index
from mmserve.kernels.prefill_attention.cpu_tiles import is_available
from tests.attention.mminference_cases import union_mask, view_of

NARROW = Lines(sink=1, local=4)
HEAD = Head(vision=NARROW, text=NARROW, vision_to_text=NARROW, text_to_vision=NARROW, recall=0.5)
PROFILE = AttentionProfile(
    model="m",
    inputs=Inputs(digest="00", prompts=1, tokens=9),
    budget=0.3,
    costs="counted",
    heads=((HEAD, replace(HEAD, boundary="k")),) * 3,
)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    file = tmp_path / "profile.json"
    file.write_text(PROFILE.to_json())
    assert load_profile(str(file)) == PROFILE
    assert json.loads(file.read_text())["version"] == 1


def changed(change: dict[str, Any], *path: str | int) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(PROFILE.to_json())
    at: Any = content
    for step in path:
        at = at[step]
    at |= change
    return content


@pytest.mark.parametrize(
    "content",
    [
        [],
        {},
        changed({"version": 2}),
        changed({"more": 1}),
        changed({"heads": 3}),
        changed({"heads": [[json.loads(PROFILE.to_json())["heads"][0][0]], []]}),
        changed({"costs": "guessed"}),
        changed({"inputs": {"digest": "00", "prompts": 1}}),
        changed({"boundary": "x"}, "heads", 0, 1),
        changed({"recall": "high"}, "heads", 0, 1),
        changed({"local": 0}, "heads", 0, 1, "text"),
        changed({"sink": -1}, "heads", 0, 1, "text"),
        changed({"vline": 1}, "heads", 0, 1, "text"),
        changed({"pattern": "none"}, "heads", 0, 1, "text"),
        changed({"vision": None}, "heads", 0, 1),
    ],
)
def test_other_content_is_refused(content: object) -> None:
    with pytest.raises(ConfigError, match="Expected"):
        read_profile(content)


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "profile.json"
    with pytest.raises(ConfigError, match="cannot be read"):
        load_profile(str(file))
    file.write_text("{")
    with pytest.raises(ConfigError, match="no JSON"):
        MMInference(profile=str(file))


def test_a_profile_says_what_each_head_does(tmp_path: Path) -> None:
    file = tmp_path / "profile.json"
    wide = replace(NARROW, local=1000)
    heads = (HEAD, HEAD, replace(HEAD, vision=wide, text=wide, boundary="q"), HEAD)
    file.write_text(replace(PROFILE, heads=(heads,)).to_json())
    rng = np.random.default_rng(0)
    frame = np.repeat(np.arange(10), 6).astype(np.int32)
    view = view_of(rng, (frame >= 0, frame * 0, frame))
    mask = union_mask(MMInference(profile=str(file)).index(view), view)
    assert mask[2].sum() == 60 * 61 / 2
    assert mask[0].sum() < mask[2].sum() / 2
    with pytest.raises(BadRequest, match="of 2 layers with 4 heads"):
        MMInference(profile=str(file)).check_model(layers=2, heads=4, width=16)
    MMInference(profile=str(file)).check_model(layers=1, heads=4, width=16)


def gridded(rng: np.random.Generator, stride: int, frames: int) -> Recorded:
    """Two heads that look at one place of every frame, and two that look at what is near."""
    total = stride * frames + 5
    frame = np.concatenate([np.repeat(np.arange(frames), stride), np.full(5, -1)]).astype(np.int32)
    q, k, v = (torch.from_numpy(rng.standard_normal((total, n, 16)).astype(np.float32)) for n in (4, 2, 2))
    direction = torch.full((16,), 1.5)
    k[3 : stride * frames : stride, 0] += direction
    q[:, :2] += direction
    # what is near has like keys: a slow rotation
    angle = torch.arange(total)[:, None] / 6
    wave = torch.cat([angle.cos(), angle.sin()], 1) * 3
    k[:, 1, :2] = wave
    q[:, 2:, :2] = wave[:, None]
    return Recorded(
        is_visual=frame >= 0, item=np.minimum(frame, 0), frame=frame, queries=(q,), keys=(k,), values=(v,)
    )


def test_the_search_gives_heads_the_lines_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    # sizes need not be exact
    monkeypatch.setattr("mmserve.attention.search.BISECTIONS", 5)
    rng = np.random.default_rng(1)
    prompt = gridded(rng, 20, 20)
    plan = Plan(sink=2, local=8, budget=0.35, chunk_rows=160, tile_rows=32)
    told: list[str] = []
    profile = search([prompt], plan, model="m", inputs=PROFILE.inputs, tell=told.append)
    assert read_profile(json.loads(profile.to_json())) == profile
    (heads,) = profile.heads
    assert [head.vision.pattern == "grid" and head.vision.vline for head in heads[:2]] == [True, True]
    assert all(head.cost is not None and head.cost < 0.45 for head in heads)
    assert len(told) == 1
    layer = Layer([prompt], 0, plan, COUNTED)
    plain = layer.run([replace(HEAD, vision=Lines(sink=2, local=100), vision_to_text=NARROW)] * 4)
    assert all(head.error is not None and head.error <= plain.error[at] for at, head in enumerate(heads[:2]))


def test_costs_count_what_is_gathered_and_multiplied() -> None:
    index = dense_index([8], [8], q_heads=2, kv_heads=1, tile_rows=4)
    assert COUNTED.of(index, 2).tolist() == [4 * (16 + 4) + 8 * (16 + 4)] * 2
    q, k = torch.randn(64, 2, 8), torch.randn(64, 1, 8)
    assert measure(q, k, k) == COUNTED
    if is_available(q.bfloat16(), k.bfloat16()):
        costs = measure(q.bfloat16(), k.bfloat16(), k.bfloat16())
        assert costs.kind == "measured"
        assert costs.product > 0
