"""Decode steps on static, padded inputs against ordinary steps; nothing in a step may wait for the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mmserve.attention import cuda
from mmserve.attention.cuda import CudaAttention
from mmserve.engine import graphs as graphs_module
from mmserve.engine import runner as runner_module
from mmserve.engine.graphs import DecodeGraphs, Size, Step
from mmserve.engine.rows import DecodeRow, PromptRows
from mmserve.engine.runner import Runner
from mmserve.engine.scheduler import Chunk, Plan
from mmserve.kernels.dispatch import VARIABLE
from mmserve.kernels.prefill_attention import AttentionIndex, Partial
from mmserve.kv.store import PageStore
from mmserve.kv.table import PageTable
from mmserve.models.fused import Rotation
from mmserve.pruning.carriers import seen_until
from tests.workers.fakes import tiny_decoder

PAGES, PAGE_SIZE, WIDTH = 400, 4, 8


class FakeCapture:
    """A graph's manners without a GPU: a warm-up, then the same output tensor at every replay."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, step: Step) -> Step:
        self.count += 1
        static = step()

        def replay() -> Tensor:
            return static.copy_(step())

        return replay


class Side:
    """A runner on pages of its own, and how far each of its sequences is."""

    def __init__(self, capture: FakeCapture | None, device: str = "cpu") -> None:
        decoder = tiny_decoder().to(device)
        self.table = PageTable(2, 2, PAGES, PAGE_SIZE)
        store = PageStore(PAGES, PAGE_SIZE, WIDTH, device=device)
        self.runner = Runner(decoder, self.table, store, torch.device(device))
        if capture is not None:
            self.runner.graphs = DecodeGraphs(decoder, self.table, store, capture)
        self.next: dict[str, int] = {}

    def prefill(self, name: str, count: int, headroom: int = 0) -> Tensor:
        places = np.arange(count, dtype=np.int32)
        embeddings = self.runner.embed([token % 47 + 1 for token in range(count)])
        prompt = PromptRows(
            embeddings=embeddings,
            order=places,
            position=places,
            is_visual=np.zeros(count, np.bool_),
            is_observed=True,
        )
        self.runner.add(name, prompt, headroom=headroom)
        self.next[name] = count
        return self.runner.run(Plan(decodes=(), chunks=(Chunk(name, 0, count),)), {}).logits

    def decode(self, tokens: Mapping[str, int], chunks: Sequence[Chunk] = ()) -> Tensor:
        rows = {name: DecodeRow(token, self.next[name], self.next[name]) for name, token in tokens.items()}
        for name in rows:
            self.next[name] += 1
        return self.runner.run(Plan(decodes=tuple(rows), chunks=tuple(chunks)), rows).logits

    def keep(self, name: str, layer: int, head: int, slots: list[int]) -> None:
        moves = self.table.keep(name, layer, head, np.array(slots, np.int64))
        self.runner.store.copy(*moves)

    def release(self, name: str) -> None:
        self.runner.release(name)


class Pair:
    """The same steps on both sides; their logits have to agree."""

    def __init__(self) -> None:
        self.capture = FakeCapture()
        self.sides = Side(None), Side(self.capture)

    def prefill(self, name: str, count: int, headroom: int = 0) -> None:
        for side in self.sides:
            side.prefill(name, count, headroom)

    def keep(self, name: str, layer: int, head: int, slots: list[int]) -> None:
        for side in self.sides:
            side.keep(name, layer, head, slots)

    def release(self, name: str) -> None:
        for side in self.sides:
            side.release(name)

    def decode(self, **tokens: int) -> Tensor:
        expected, found = (side.decode(tokens) for side in self.sides)
        assert found.shape == expected.shape
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        return found


@pytest.fixture
def pair() -> Pair:
    return Pair()


def test_sizes_are_powers_of_two() -> None:
    assert [Size.that_fits(rows, 1).rows for rows in (1, 2, 3, 5, 8, 9, 64)] == [1, 2, 4, 8, 8, 16, 64]
    assert [Size.that_fits(1, pages).pages for pages in (1, 16, 17, 200, 1024)] == [16, 16, 32, 256, 1024]


@pytest.mark.parametrize("kernels", ["naive", "interpret"])
def test_padded_steps_give_what_ordinary_steps_give(
    pair: Pair, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, kernels)
    pair.prefill("a", 9, headroom=8)
    pair.prefill("b", 30)
    pair.prefill("c", 1)
    pair.keep("b", 0, 1, [0, 3, 29])
    pair.keep("b", 1, 0, list(range(20)))
    pair.decode(a=3, b=4, c=5)
    pair.decode(b=6, a=7)
    pair.decode(a=8)
    pair.decode(a=9, b=10, c=11)


def test_a_row_forgets_whose_pages_it_had(pair: Pair) -> None:
    for name, count in {"a": 9, "b": 30, "c": 5}.items():
        pair.prefill(name, count, headroom=4)
    pair.decode(a=3, b=4)
    pair.decode(b=4, a=3)
    pair.decode(b=4, c=3)
    # another sequence of the same name, in the same row, on other pages
    pair.release("b")
    pair.prefill("d", 12)
    pair.prefill("b", 7)
    pair.decode(b=4, c=3)
    pair.decode(d=1)
    pair.keep("c", 0, 0, [1, 2])
    pair.decode(b=4, c=3)


def test_a_size_is_captured_once_and_a_result_stays(pair: Pair) -> None:
    for name in ("a", "b", "c"):
        pair.prefill(name, 5, headroom=60)
    first = pair.decode(a=1, b=2, c=3)
    kept = first.clone()
    for token in range(4, 12):
        pair.decode(a=token, b=token, c=token)
    assert torch.equal(first, kept)
    assert pair.capture.count == 1
    pair.decode(a=1)
    assert pair.capture.count == 2
    pair.prefill("long", 130)
    pair.decode(long=1)
    assert pair.capture.count == 3


def test_padding_changes_no_page(pair: Pair) -> None:
    pair.prefill("a", 9)
    pair.prefill("b", 4)
    pair.prefill("c", 4)
    pair.decode(a=1, b=2, c=3)
    pair.decode(c=4)
    pages = [side.runner.store.k for side in pair.sides]
    torch.testing.assert_close(*pages, rtol=1e-5, atol=1e-5)


def test_steps_with_prompts_and_larger_batches_run_as_they_are(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner_module, "MAX_ROWS", 1)
    for name in ("a", "b"):
        pair.prefill(name, 5)
    pair.decode(a=1, b=2)
    assert pair.capture.count == 0
    pair.decode(a=1)
    assert pair.capture.count == 1


class NothingWaits(TorchDispatchMode):
    """Every tensor that meets one of the device comes from there, or is copied without waiting.

    The device is `meta`: whatever needs a value of it (item, tolist, a mask) fails by itself.
    """

    copies = 0

    def __torch_dispatch__(
        self,
        func: Any,  # noqa: ANN401  # torch's own signature
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        out = func(*args, **(kwargs or {}))
        leaves = torch.utils._pytree.tree_leaves((args, out))
        devices = {leaf.device.type for leaf in leaves if isinstance(leaf, Tensor)}
        if devices == {"cpu", "meta"}:
            name = func.overloadpacket.__name__
            options = dict(zip(("self", "src", "non_blocking"), args, strict=False)) | (kwargs or {})
            assert name in ("to", "_to_copy", "copy_"), f"{name} mixes devices"
            assert options.get("non_blocking"), f"{name} waits"
            self.copies += 1
        return out


@pytest.fixture
def on_meta(monkeypatch: pytest.MonkeyPatch) -> Side:
    """A runner on a device without values; the kernels, which have tests of their own, do nothing."""

    def decode(q: Tensor, *_: object) -> Tensor:
        return torch.empty_like(q)

    def append(qkv: Tensor, rotation: Rotation, slots: Tensor, store: PageStore) -> Tensor:
        assert slots.shape == (2, len(qkv))
        return torch.empty_like(qkv[:, : qkv.shape[1] - 2 * len(slots)])

    def prefill(
        q: Tensor, k: Tensor, v: Tensor, index: AttentionIndex, *, scale: float, tables: Tensor | None
    ) -> Partial:
        assert index.tiles.device == index.key_begin.device == k.device
        return Partial(torch.empty_like(q), q.new_empty(q.shape[:2]))

    monkeypatch.setattr(cuda, "decode_attention", decode)
    monkeypatch.setattr(cuda, "prefill_attention", prefill)
    monkeypatch.setattr(cuda, "append", append)
    monkeypatch.setattr(graphs_module, "decode_attention", decode)
    monkeypatch.setattr(graphs_module, "append", append)
    side = Side(FakeCapture(), device="meta")
    side.runner.attention = CudaAttention
    return side


def test_nothing_in_a_step_waits_for_the_device(on_meta: Side) -> None:
    on_meta.prefill("first", 1)  # what is made once may wait
    mode = NothingWaits()  # type: ignore[no-untyped-call]  # torch has no types here
    with mode:
        on_meta.prefill("a", 9)
        prefill, mode.copies = mode.copies, 0
        logits = on_meta.decode({"a": 1})
        decode, mode.copies = mode.copies, 0
        assert logits.shape == (1, tiny_decoder().config.vocab_size)
        on_meta.runner.add("b", on_meta.runner.prompts.pop("a"))
        on_meta.runner.prompts["b"].done = 0
        on_meta.decode({"a": 2}, [Chunk("b", 0, 9)])
    assert decode == 1, "a replayed step copies its inputs at once"
    assert prefill < 16


def test_frames_that_nobody_will_see_leave_without_waiting(on_meta: Side) -> None:
    runner, places = on_meta.runner, np.arange(9, dtype=np.int32)
    prompt = PromptRows(
        embeddings=runner.embed(places.tolist()),
        order=places,
        position=places,
        is_visual=(places > 0) & (places < 7),
        until=seen_until(torch.tensor([-1, 0, 0, 0, 1, 1, 1, -1, -1])).numpy().astype(np.int32),
    )
    on_meta.prefill("first", 9)  # what is made once may wait
    with NothingWaits():  # type: ignore[no-untyped-call]  # torch has no types here
        runner.add("v", prompt)
        runner.run(Plan(decodes=(), chunks=(Chunk("v", 0, 5),)), {})
        assert runner.table.order("v", 0, 0).tolist() == [0, 3, 4]
        runner.run(Plan(decodes=(), chunks=(Chunk("v", 5, 9),)), {})
    assert runner.table.order("v", 1, 1).tolist() == [0, 3, 6, 7, 8]
