"""Prompts that are thinned out between layers, against one plain pass with the same drop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mmserve import messages as m
from mmserve.attention.backend import ATTENTION
from mmserve.attention.cuda import CudaAttention
from mmserve.attention.paged import PagedAttention, SequenceRows, Watch
from mmserve.kv.store import PageStore
from mmserve.kv.table import PageTable
from mmserve.methods import INNER, WITH_WEIGHTS
from mmserve.models.decoder import TextDecoder
from mmserve.pruning.base import exact_count
from mmserve.pruning.inner import make_reducer
from mmserve.request import Methods, Option
from mmserve.sampling import SamplingParams
from mmserve.tensors import tensors_of
from mmserve.transfer import open_lease
from tests.engine.inner_oracle import Laid, answer, by_method, drop_by, last_row
from tests.pruning.predictors import HEADS, write_predictor
from tests.workers.fakes import BOTH, IMAGE, VIDEO, WIDTH, Engine, tiny_decoder, whole

LONG = SamplingParams(max_tokens=8, ignore_eos=True)
PROMPT = (1, 2, 6, 9, 4, VIDEO, 3, IMAGE, 4, 5)
LAYERS = 4
# so that the random rows of these tests are merged
SETTINGS: dict[str, dict[str, Option]] = {"framefusion_m": {"similarity": 0.1}}
UNLIMITED = 1 << 20


def decoder() -> TextDecoder:
    return tiny_decoder(layers=LAYERS)


def media(engine: Engine) -> tuple[m.PromptItem, ...]:
    """A video in two parts, some of it lost to an encoder-side method, and an image."""
    first = engine.part(9, [0, 2, 3, 8], seed=1, frame_tokens=3)
    second = engine.part(14, seed=1, first=9, frame_tokens=3)
    return whole(first, second), engine.item(5, seed=2)


def laid_out(engine: Engine, directory: Path) -> Laid:
    """The prompt as its rows."""
    items, rows, visual, reducible = enumerate(media(engine)), list[Tensor](), list[int](), list[int]()
    places, patch, length = list[int](), list[int](), 0
    for token in PROMPT:
        if token not in (VIDEO, IMAGE):
            rows.append(engine.runner.embed([token]))
            places.append(length)
            patch.append(-1)
            length += 1
            continue
        start = sum(map(len, rows))
        number, item = next(items)
        for part in item.parts:
            arrays = open_lease(part.lease, [directory])
            source = arrays["source"].astype(int)
            rows.append(tensors_of(part.lease, arrays)["embeddings"])
            places += (source + length).tolist()
            patch += (1000 * number + source % (part.frame_tokens or 1000)).tolist()
            length += part.tokens
        stop = sum(map(len, rows))
        visual += range(start, stop)
        reducible += range(start, stop - 1)
    return Laid(torch.cat(rows), places, visual, reducible, patch)


def finish(
    engine: Engine, prune: str, keep: float, *, kv: str = "none", options: dict[str, Option] | None = None
) -> list[int]:
    methods = Methods(prune=prune, keep=keep, kv=kv, kv_budget=0.5, prune_options=options or {})
    engine.prefill("r", PROMPT, media(engine), sampling=LONG, methods=methods)
    engine.prefill("other", (9, 8, 7, 6, 5, 4), sampling=LONG)
    engine.prefill("video", (VIDEO, 3), media(engine)[:1], sampling=LONG)
    engine.finish()
    assert not engine.reporter.of(m.RequestFailed)
    assert engine.used_pages == 0
    engine.check()
    return engine.answer("r")


def prefilled(engine: Engine, name: str = "r") -> m.PromptPrefilled:
    return next(e for e in engine.reporter.of(m.PromptPrefilled) if e.request_id == name)


@pytest.mark.parametrize("keep", [0.5, 0.1])
@pytest.mark.parametrize("budget", [1, 7, 64, UNLIMITED])
def test_fastv_in_chunks_equals_one_plain_pass(tmp_path: Path, budget: int, keep: float) -> None:
    engine = Engine(tmp_path, decoder=decoder(), token_budget=budget)
    laid = laid_out(engine, tmp_path)
    drop = drop_by(last_row, lambda seen: exact_count(keep, seen.entered))
    expected, lengths = answer(decoder(), laid, LONG.max_tokens, {2: drop})
    assert finish(engine, "fastv", keep) == expected
    event = prefilled(engine)
    assert event.kv_bytes < event.kv_bytes_uncompressed
    assert event.slots == len(laid.embeddings)
    assert event.next_position == event.next_order == laid.places[-1] + 1
    per_slot = event.kv_bytes_uncompressed // (LAYERS * event.slots)
    assert event.kv_bytes == sum(lengths) * per_slot
    assert event.visual_by_layer == tuple(length - len(PROMPT) + 2 for length in lengths)
    assert event.kv_bytes_dense == per_slot * LAYERS * event.next_order
    others = Engine(tmp_path, decoder=decoder())
    finish(others, "none", 1.0)
    for name in ("other", "video"):
        assert engine.answer(name) == others.answer(name)


@pytest.mark.parametrize("layers", [2, 7])
@pytest.mark.parametrize("budget", [5, UNLIMITED])
@pytest.mark.parametrize("name", INNER)
def test_every_method_in_chunks_equals_one_plain_pass(
    tmp_path: Path, name: str, budget: int, layers: int
) -> None:
    engine = Engine(tmp_path, decoder=tiny_decoder(layers=layers), token_budget=budget)
    options: dict[str, Option] = dict(SETTINGS.get(name, {}))
    if name in WITH_WEIGHTS:
        options = {"weights": write_predictor(tmp_path / "p.safetensors", WIDTH), "heads": HEADS}
    reducer = make_reducer(name, 0.3, **options)
    drops = dict.fromkeys(reducer.layers(layers), by_method(reducer))
    laid = laid_out(engine, tmp_path)
    expected, lengths = answer(
        tiny_decoder(layers=layers), laid, LONG.max_tokens, drops, drops_below=reducer.drops_below
    )
    assert finish(engine, name, 0.3, options=options) == expected
    text = len(PROMPT) - 2
    assert prefilled(engine).visual_by_layer == tuple(length - text for length in lengths)


def test_what_prunevid_drops_leaves_the_layers_below_as_well(tmp_path: Path) -> None:
    engine = Engine(tmp_path, decoder=decoder(), token_budget=7)
    finish(engine, "prunevid_m", 0.3)
    event, text = prefilled(engine), len(PROMPT) - 2
    assert event.visual_by_layer == (23, 8, 8, 8), "the first layer has run all of them"
    assert event.slots == text + 2 + 6, "21 can be dropped"
    assert event.kv_bytes * (text + 23) == event.kv_bytes_uncompressed * event.slots


@pytest.mark.parametrize("budget", [1, 7, 64, UNLIMITED])
@pytest.mark.parametrize("kv", ["none", "snapkv"])
def test_to_keep_everything_is_to_reduce_nothing(tmp_path: Path, budget: int, kv: str) -> None:
    dense = Engine(tmp_path, decoder=decoder())
    engine = Engine(tmp_path, decoder=decoder(), token_budget=budget)
    assert finish(engine, "fastv", 1.0, kv=kv) == finish(dense, "none", 1.0, kv=kv)
    for name in ("slots", "kv_bytes", "kv_bytes_uncompressed", "next_order", "next_position"):
        assert getattr(prefilled(engine), name) == getattr(prefilled(dense), name)
    assert prefilled(engine).visual_by_layer == prefilled(dense).visual_by_layer == (23,) * LAYERS


@pytest.mark.parametrize("kv", ["snapkv", "random"])
def test_a_kv_policy_acts_on_what_is_left_in_each_layer(tmp_path: Path, kv: str) -> None:
    answers = []
    for budget in (3, UNLIMITED):
        engine = Engine(tmp_path, decoder=decoder(), token_budget=budget)
        answers.append(finish(engine, "fastv", 0.5, kv=kv))
        event, text = prefilled(engine), len(PROMPT) - 2
        # 23 visual rows, two of them newlines: 12 pass layer 2
        slots = 2 * (text + 11) + 2 * (text + 6)
        assert event.kv_bytes / event.kv_bytes_uncompressed == slots / (LAYERS * (text + 23))
    assert answers[0] == answers[1]


@pytest.mark.parametrize("kv", ["none", "snapkv"])
def test_prefill_here_and_decode_there_equals_one_worker(tmp_path: Path, kv: str) -> None:
    methods = Methods(prune="fastv", keep=0.4, kv=kv, kv_budget=0.5)
    together = Engine(tmp_path, decoder=decoder())
    expected = finish(together, "fastv", 0.4, kv=kv)
    prefill = Engine(tmp_path, decoder=decoder(), roles=BOTH[:1])
    decode = Engine(tmp_path, decoder=decoder(), roles=BOTH[1:])
    prefill.prefill("r", PROMPT, media(prefill), sampling=LONG, methods=methods, hand_off=True)
    prefill.run()
    decode.handler.handle(prefill.continuation(prefilled(prefill)))
    decode.run()
    assert prefill.answer("r") + decode.answer("r") == expected
    for engine in (prefill, decode):
        assert engine.used_pages == 0
        engine.check()


def test_prompts_that_pass_the_same_layers_go_together(tmp_path: Path) -> None:
    engine = Engine(tmp_path, decoder=decoder())
    asked = {"a": ("fastv", 0.4), "b": ("fastv", 0.6), "c": ("none", 1.0)}
    passes: list[tuple[range | None, list[str]]] = []
    attend = engine.runner.attention

    def counted(
        table: PageTable,
        store: PageStore,
        batch: Sequence[SequenceRows],
        observe: Mapping[str, Sequence[int]] | None = None,
        layers: range | None = None,
        watch: Sequence[Watch] = (),
    ) -> PagedAttention:
        passes.append((layers, [rows.sequence for rows in batch]))
        return attend(table, store, batch, observe, layers, watch)

    engine.runner.attention = counted  # type: ignore[assignment]  # what it makes is the same
    for name, (prune, keep) in asked.items():
        methods = Methods(prune=prune, keep=keep)
        engine.prefill(name, PROMPT, media(engine), sampling=LONG, methods=methods)
    engine.run()
    assert passes == [(range(2), ["a", "b"]), (None, ["c"]), (range(2, 4), ["a", "b"])]
    engine.finish()
    for name, (prune, keep) in asked.items():
        alone = Engine(tmp_path, decoder=decoder())
        assert engine.answer(name) == finish(alone, prune, keep)


def test_what_was_streamed_is_replayed_after_a_death(tmp_path: Path) -> None:
    expected = finish(Engine(tmp_path, decoder=decoder()), "fastv", 0.3)
    for streamed in (1, 5):
        again = Engine(tmp_path, decoder=decoder(), token_budget=5)
        methods, forced = Methods(prune="fastv", keep=0.3), tuple(expected[:streamed])
        again.prefill("r", PROMPT, media(again), sampling=LONG, methods=methods, forced=forced)
        again.finish()
        assert again.answer("r") == expected[streamed:]


@pytest.mark.parametrize(
    ("name", "below"), [("fastv", 2), ("holitom_m", 3), ("cdpruner", 0), ("sparsevlm", 0)]
)
def test_the_first_layers_run_while_a_prompt_grows(tmp_path: Path, name: str, below: int) -> None:
    expected = Engine(tmp_path, decoder=decoder())
    methods = Methods(prune=name, keep=0.3)
    parts = expected.part(80, seed=1), expected.part(9, seed=1, first=80)
    expected.prefill("r", (1, 2, VIDEO, 3), (whole(*parts),), sampling=LONG, methods=methods)
    expected.finish()
    grown = Engine(tmp_path, decoder=decoder())
    start = m.PromptItem(parts=parts[:1], is_whole=False, keep_bound=100)
    grown.prefill("r", (1, 2, VIDEO, 3), (start,), sampling=LONG, methods=methods)
    grown.run()
    if below:
        rows = grown.runner.prompts["r"]
        assert rows.done == rows.ready == 2 + 80 - 64
        assert grown.table.lengths("r").tolist() == [[18, 18]] * below + [[0, 0]] * (LAYERS - below)
    else:
        assert not grown.used_pages, "what acts on the embeddings needs them all"
    grown.handler.handle(m.ExtendPrompt(request_id="r", attempt=0, item=0, part=parts[1], is_last=True))
    grown.finish()
    assert grown.answer("r") == expected.answer("r")


def test_pages_that_upper_layers_do_not_need_become_free(tmp_path: Path) -> None:
    held = []
    for prune in ("none", "fastv"):
        engine = Engine(tmp_path, decoder=decoder())
        methods = Methods(prune=prune, keep=0.1 if prune == "fastv" else 1.0)
        engine.prefill("r", (1, VIDEO, 3), (engine.item(101),), sampling=LONG, methods=methods)
        engine.run()
        held.append(engine.table.used_pages)
        engine.check()
    # 103 rows and 8 of the answer; 90 were dropped in two of four layers
    assert held == [2 * LAYERS * 28, 2 * (2 * 28 + 2 * 6)]


def test_only_the_text_before_the_first_item_is_shared(tmp_path: Path) -> None:
    engine = Engine(tmp_path, decoder=decoder())
    first = finish(engine, "fastv", 0.5)
    for name, prune, expected in (("again", "fastv", 4), ("dense", "none", 0)):
        methods = Methods(prune=prune, keep=0.5 if prune == "fastv" else 1.0)
        engine.prefill(name, PROMPT, media(engine), sampling=LONG, methods=methods)
        engine.finish()
        assert prefilled(engine, name).cached_slots == expected
    assert engine.answer("again") == first
    fresh = Engine(tmp_path, decoder=decoder())
    assert engine.answer("dense") == finish(fresh, "none", 1.0)


def test_preempted_while_it_is_reduced_it_begins_anew(tmp_path: Path) -> None:
    expected = finish(Engine(tmp_path, decoder=decoder()), "fastv", 0.5)
    engine = Engine(tmp_path, decoder=decoder(), token_budget=7)
    methods = Methods(prune="fastv", keep=0.5)
    for steps in range(8):
        engine.prefill("r", PROMPT, media(engine), sampling=LONG, methods=methods)
        for _ in range(steps):
            engine.handler.step()
        engine.handler.handle(m.CancelRequest(request_id="r"))
        assert engine.used_pages == 0
        engine.check()
        engine.reporter.events.clear()
    assert finish(engine, "fastv", 0.5) == expected


def test_log_probabilities_of_its_prompt_are_refused(tmp_path: Path) -> None:
    engine = Engine(tmp_path)
    sampling = SamplingParams(max_tokens=2, prompt_logprobs=1)
    engine.prefill("r", PROMPT, media(engine), sampling=sampling, methods=Methods(prune="fastv"))
    engine.finish()
    (failure,) = engine.reporter.of(m.RequestFailed)
    assert failure.code == "bad_request"
    assert "prompt_logprobs with prune fastv" in failure.public_message


def test_a_method_that_fails_fails_its_request_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = Engine(tmp_path, decoder=decoder())

    def broken(*_: object) -> None:
        raise RuntimeError("a kernel fell over")

    monkeypatch.setattr("mmserve.pruning.fastv.keep_top", broken)
    engine.prefill("r", PROMPT, media(engine), methods=Methods(prune="fastv", keep=0.5))
    engine.prefill("good", (1, 2, 3))
    engine.finish()
    assert [event.request_id for event in engine.reporter.of(m.RequestFailed)] == ["r"]
    assert len(engine.answer("good")) == 5
    assert engine.used_pages == 0
    assert caplog.records


def test_a_prompt_without_media_is_not_split(tmp_path: Path) -> None:
    engine = Engine(tmp_path, decoder=decoder())
    engine.prefill("r", (1, 2, 3), methods=Methods(prune="fastv", keep=0.1))
    engine.prefill("dense", (1, 2, 3))
    engine.finish()
    assert engine.answer("r") == engine.answer("dense")


@pytest.mark.parametrize("attention", [PagedAttention, CudaAttention])
@pytest.mark.parametrize("budget", [1, 7, UNLIMITED])
def test_every_attention_gives_the_same_tokens(
    tmp_path: Path, attention: type[PagedAttention], budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = finish(Engine(tmp_path, decoder=decoder()), "fastv", 0.4)
    monkeypatch.setitem(ATTENTION, "cpu", attention)
    engine = Engine(tmp_path, decoder=decoder(), token_budget=budget)
    assert finish(engine, "fastv", 0.4) == expected
