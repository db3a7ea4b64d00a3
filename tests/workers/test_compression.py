"""Every KV policy on a tiny engine: chunks, hand-off, recovery, pages; what is left, by masked attention."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mmserve import messages as m
from mmserve.attention.cuda import CudaAttention
from mmserve.engine.rows import PromptRows
from mmserve.engine.runner import Runner
from mmserve.errors import BadRequest
from mmserve.kv.base import POLICIES, make_policy
from mmserve.kv.identity import Identity
from mmserve.methods import WITH_WEIGHTS
from mmserve.models.decoder import Attend
from mmserve.request import Methods, Option
from mmserve.sampling import SamplingParams
from tests.workers.carried import Clip
from tests.workers.fakes import BOTH, IMAGE, VIDEO, WIDTH, Engine, tiny_decoder

LAYERS = 3
LONG = SamplingParams(max_tokens=6, ignore_eos=True)
PROMPT = (1, 2, VIDEO, 3, IMAGE, 4, 5, 6)
EVERY = sorted(set(POLICIES) - {"none"})
PROBED = sorted(name for name in EVERY if make_policy(name).probe() is not None)
OBSERVED = sorted(name for name in EVERY if make_policy(name).observer() is not None)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("weights")
    generator = torch.Generator().manual_seed(3)
    zap: dict[str, Tensor] = {}
    locret: dict[str, Tensor] = {}
    for layer in range(LAYERS):
        zap[f"layers.{layer}.0.weight"] = torch.randn(5, WIDTH, generator=generator)
        zap[f"layers.{layer}.0.bias"] = torch.randn(5, generator=generator)
        zap[f"layers.{layer}.2.weight"] = torch.randn(2, 5, generator=generator)
        at = f"model.layers.{layer}.self_attn"
        locret[f"{at}.fc1.weight"] = torch.randn(6, 64, generator=generator)
        locret[f"{at}.fc2.weight"] = torch.randn(2, 6, generator=generator)
    save_file(zap, folder / "zap")
    save_file(locret, folder / "locret")
    (folder / "duo").write_text(json.dumps({"gates": [[0.9, 0.1]] * LAYERS}))
    return {"kvzap": str(folder / "zap"), "locret": str(folder / "locret"), "duo": str(folder / "duo")}


def methods_of(name: str, files: dict[str, str], budget: float = 0.5) -> Methods:
    options: dict[str, Option] = {}
    if name in WITH_WEIGHTS:
        options = {"weights": files[name]}
        options |= {"sink": 4, "recent": 4} if name == "duo" else {"window": 4}
    if name == "kvzip":
        options = {"chunk": 16}
    return Methods(kv=name, kv_budget=budget, kv_options=options)


def engine_of(folder: Path, **settings: object) -> Engine:
    return Engine(folder, decoder=tiny_decoder(layers=LAYERS), **settings)  # type: ignore[arg-type]


def items(engine: Engine) -> tuple[m.PromptItem, ...]:
    return engine.item(20, [*range(0, 20, 2), 19], seed=1), engine.item(9, seed=2)


def answered(engine: Engine, methods: Methods, **settings: object) -> tuple[list[int], m.PromptPrefilled]:
    engine.prefill("r", PROMPT, items(engine), sampling=LONG, methods=methods, **settings)  # type: ignore[arg-type]
    engine.finish()
    assert not engine.reporter.of(m.RequestFailed)
    (event,) = engine.reporter.of(m.PromptPrefilled)
    assert engine.used_pages == 0
    engine.check()
    return engine.answer("r"), event


@pytest.mark.parametrize("name", EVERY)
def test_a_prompt_in_chunks_equals_a_prompt_in_one_step(
    tmp_path: Path, name: str, files: dict[str, str]
) -> None:
    methods = methods_of(name, files)
    tokens, event = answered(engine_of(tmp_path), methods)
    chunked, other = answered(engine_of(tmp_path, token_budget=7), methods)
    assert tokens == chunked
    assert (event.slots, event.kv_bytes) == (other.slots, other.kv_bytes)
    assert event.kv_bytes < event.kv_bytes_uncompressed


@pytest.mark.parametrize("name", sorted(set(EVERY) - {"zipvl", "fastkv"}))
def test_the_whole_budget_gives_the_tokens_of_no_policy(
    tmp_path: Path, name: str, files: dict[str, str]
) -> None:
    plain, _ = answered(engine_of(tmp_path), Methods())
    tokens, event = answered(engine_of(tmp_path), methods_of(name, files, 1.0))
    assert tokens == plain
    assert event.kv_bytes == event.kv_bytes_uncompressed


def test_fastkv_without_propagation_keeps_everything_too(tmp_path: Path) -> None:
    plain, _ = answered(engine_of(tmp_path), Methods())
    methods = Methods(kv="fastkv", kv_budget=1.0, kv_options={"rate": 1.0})
    assert answered(engine_of(tmp_path), methods)[0] == plain


@pytest.mark.parametrize("name", EVERY)
def test_a_hand_off_and_a_recovery_change_nothing(tmp_path: Path, name: str, files: dict[str, str]) -> None:
    methods = methods_of(name, files, 0.4)
    whole, _ = answered(engine_of(tmp_path), methods)
    prefill, decode = engine_of(tmp_path, roles=BOTH[:1]), engine_of(tmp_path, roles=BOTH[1:])
    prefill.prefill("r", PROMPT, items(prefill), sampling=LONG, methods=methods, hand_off=True)
    prefill.run()
    (event,) = prefill.reporter.of(m.PromptPrefilled)
    decode.handler.handle(prefill.continuation(event))
    decode.run()
    assert prefill.answer("r") + decode.answer("r") == whole
    again = engine_of(tmp_path)
    rest, _ = answered(again, methods, forced=tuple(whole[:3]))
    assert rest == whole[3:]


@pytest.mark.parametrize("name", [*OBSERVED, *PROBED])
def test_what_is_cached_changes_nothing(tmp_path: Path, name: str, files: dict[str, str]) -> None:
    methods = methods_of(name, files)
    fresh, _ = answered(engine_of(tmp_path), methods)
    warm = engine_of(tmp_path)
    warm.prefill("before", PROMPT, items(warm), sampling=LONG)
    warm.finish()
    warm.prefill("r", PROMPT, items(warm), sampling=LONG, methods=methods)
    warm.finish()
    assert warm.answer("r") == fresh
    cached = warm.reporter.of(m.PromptPrefilled)[-1].cached_slots
    assert (cached > 4) == (name in PROBED)


@pytest.mark.parametrize("name", sorted({*OBSERVED, *PROBED} - {"look_m", "meda", "zipvl"}))
def test_what_is_watched_on_a_gpu_is_the_same(tmp_path: Path, name: str, files: dict[str, str]) -> None:
    methods = methods_of(name, files)
    tokens, event = answered(engine_of(tmp_path), methods)
    engine = engine_of(tmp_path, token_budget=9)
    engine.runner.attention = CudaAttention
    fused, other = answered(engine, methods)
    assert fused == tokens
    assert other.kv_bytes == event.kv_bytes


@pytest.mark.parametrize("name", PROBED)
def test_a_probe_that_cannot_have_its_pages_is_refused(
    tmp_path: Path, name: str, files: dict[str, str]
) -> None:
    # 26 rows fit into 8 pages of each of 6 heads, what runs after them does not
    engine = engine_of(tmp_path, pages=8 * 2 * LAYERS)
    engine.prefill("r", PROMPT, items(engine), sampling=LONG, methods=methods_of(name, files))
    engine.run()
    (failure,) = engine.reporter.of(m.RequestFailed)
    # nothing that gets better by trying again
    assert failure.code == BadRequest.code
    assert f"kv {name} runs after it" in failure.public_message
    assert engine.used_pages == 0
    engine.check()


@pytest.mark.parametrize("name", PROBED)
def test_a_probe_does_not_go_with_an_inner_method(tmp_path: Path, name: str) -> None:
    engine = engine_of(tmp_path)
    methods = Methods(prune="fastv", keep=0.5, kv=name)
    engine.prefill("r", PROMPT, items(engine), methods=methods)
    engine.run()
    (failure,) = engine.reporter.of(m.RequestFailed)
    assert f"with kv {name}" in failure.public_message


@pytest.mark.parametrize("name", ["snapkv", "h2o", "look_m", "knorm", "vl_cache"])
def test_a_policy_goes_with_an_inner_method(tmp_path: Path, name: str, files: dict[str, str]) -> None:
    methods = Methods(prune="fastv", keep=0.5, kv=name, kv_budget=0.5)
    tokens, event = answered(engine_of(tmp_path), methods)
    assert answered(engine_of(tmp_path, token_budget=7), methods)[0] == tokens
    assert event.kv_bytes < event.kv_bytes_uncompressed * 0.75


def test_fastkv_thins_out_tokens_half_way_up(tmp_path: Path) -> None:
    engine = engine_of(tmp_path)
    methods = Methods(kv="fastkv", kv_budget=0.5, kv_options={"rate": 0.25, "layer": 2})
    engine.prefill("r", PROMPT, items(engine), sampling=LONG, methods=methods)
    engine.run()
    text, visual, newlines = 6, 20, 2
    # half of all below; above a quarter of what may go, which is less, and what may not
    above = (visual - newlines) // 4 + newlines
    assert engine.table.lengths("r")[:, 0].tolist() == [text + visual // 2] * 2 + [text + above]


def test_a_repetition_may_be_of_nothing_that_is_left(tmp_path: Path) -> None:
    """Chunks between two carriers have no slots any more when they are repeated."""
    engine = engine_of(tmp_path)
    methods = Methods(prune="carriers", kv="kvzip", kv_budget=0.5, kv_options={"chunk": 16})
    video = Clip(frames=2, size=50, seed=1).item(engine)
    engine.prefill("r", (1, 2, VIDEO, 3, 4), (video,), sampling=LONG, methods=methods)
    engine.finish()
    assert not engine.reporter.of(m.RequestFailed)
    assert len(engine.answer("r")) == LONG.max_tokens


def test_what_acts_inside_the_model_does_not_go_with_carriers(tmp_path: Path) -> None:
    engine = engine_of(tmp_path)
    engine.prefill("r", PROMPT, items(engine), methods=Methods(prune="carriers", kv="fastkv"))
    engine.run()
    (failure,) = engine.reporter.of(m.RequestFailed)
    assert failure.code == BadRequest.code
    assert "kv fastkv" in failure.public_message


def test_a_sink_as_long_as_the_prompt_leaves_the_choice_open(tmp_path: Path) -> None:
    methods = Methods(kv="expected", kv_budget=0.5, kv_options={"sink": 1024})
    tokens, event = answered(engine_of(tmp_path), methods)
    assert len(tokens) == LONG.max_tokens
    assert event.kv_bytes < event.kv_bytes_uncompressed


@pytest.mark.parametrize("name", ["kvzap", "locret"])
def test_what_an_observer_lacks_fails_its_own_request(tmp_path: Path, name: str) -> None:
    """Others that run in the same step go on."""
    plain, _ = answered(engine_of(tmp_path), Methods())
    engine = engine_of(tmp_path)
    engine.prefill("r", PROMPT, items(engine), sampling=LONG)
    engine.prefill("no-heads", PROMPT, items(engine), sampling=LONG, methods=Methods(kv=name))
    engine.finish()
    (failure,) = engine.reporter.of(m.RequestFailed)
    assert (failure.request_id, failure.code) == ("no-heads", BadRequest.code)
    assert "kv_options.weights" in failure.public_message
    assert engine.answer("r") == plain
    assert engine.used_pages == 0


def masked(kept: dict[tuple[int, int], set[int]], rows: int) -> Attend:
    """A dense forward pass in which the last row of each head sees only the slots in `kept`."""

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        for head in range(q.shape[1]):
            own = head // (q.shape[1] // k.shape[1])
            seen = torch.ones(len(q), len(q), dtype=torch.bool).tril()
            last = torch.zeros(len(q), dtype=torch.bool)
            last[sorted(kept[layer, own])] = True
            last[rows:] = True
            seen[rows:] &= last
            logits = (q[:, head] @ k[:, own].T) * q.shape[-1] ** -0.5
            out[:, head] = logits.masked_fill(~seen, -torch.inf).softmax(-1) @ v[:, own]
        return out

    return attend


@pytest.mark.parametrize("name", ["adakv", "kvzip", "expected", "vl_cache", "duo", "random", "zipvl"])
def test_heads_of_other_lengths_equal_masked_dense_attention(
    tmp_path: Path, name: str, files: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(tmp_path)
    engine.prefill("r", PROMPT, items(engine), sampling=LONG, methods=methods_of(name, files))
    engine.run()
    (event,) = engine.reporter.of(m.PromptPrefilled)
    table = engine.table
    heads = [(layer, head) for layer in range(LAYERS) for head in range(2)]
    orders = {at: table.order("r", *at) for at in heads}
    first = event.first
    assert first is not None
    engine.handler.handle(engine.continuation(event))
    engine.run()
    tokens = engine.answer("r")
    assert len({len(order) for order in orders.values()}) > 1 or name in ("random", "zipvl")

    # the same by masks: the prompt's rows, then the answer's
    decoder = tiny_decoder(layers=LAYERS)
    prompt = engine_rows(engine, monkeypatch)
    position = np.concatenate([prompt.position, event.next_position + np.arange(len(tokens) - 1)])
    place = {int(order): row for row, order in enumerate(prompt.order)}
    kept = {at: {place[int(order)] for order in orders[at]} for at in heads}
    attend = masked(kept, len(prompt))
    with torch.inference_mode():
        rows = torch.cat([prompt.embeddings[: len(prompt)], decoder.embed(torch.tensor(tokens[:-1]))])
        hidden = decoder(rows, torch.from_numpy(position.astype(np.int32)), attend)
        expected = decoder.logits(hidden[len(prompt) - 1 :]).argmax(-1).tolist()
    assert tokens == expected


def engine_rows(engine: Engine, patch: pytest.MonkeyPatch) -> PromptRows:
    """The prompt's rows as the handler lays them out."""
    seen: list[PromptRows] = []
    add = Runner.add

    def watch(
        runner: Runner,
        sequence: str,
        prompt: PromptRows,
        *,
        headroom: int = 0,
        identity: Identity | None = None,
        most_cached: int = 0,
    ) -> None:
        seen.append(prompt)
        add(runner, sequence, prompt, headroom=headroom, identity=identity, most_cached=most_cached)

    patch.setattr(Runner, "add", watch)
    engine.prefill("again", PROMPT, items(engine), sampling=LONG, hand_off=True)
    engine.run()
    return seen[0]
