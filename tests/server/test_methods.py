"""The names that torch-free parts know are those that are registered."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from typing import Any

import msgspec
import pytest

from mmserve.attention.base import PATTERNS
from mmserve.budget import DEFAULT_KEEP
from mmserve.config import MethodDefaults, PruneUnderLoad, ServeConfig
from mmserve.errors import BadRequest, ConfigError
from mmserve.kv.base import POLICIES
from mmserve.methods import INNER, NAMES, choose_methods, deployed_methods, inner_part, least_keep, outer_part
from mmserve.pruning.base import PRUNERS
from mmserve.pruning.inner import REDUCERS, load_reducer
from mmserve.request import Methods, Option

PLAIN = MethodDefaults()


def test_the_names_are_those_of_the_registries() -> None:
    assert tuple(REDUCERS) == tuple(INNER)
    assert NAMES["prune"] == (*PRUNERS, *REDUCERS)
    assert NAMES["attention"] == ("dense", *PATTERNS)
    assert NAMES["kv"] == tuple(POLICIES)


def test_what_a_method_keeps_by_default_is_its_own_inside_the_model() -> None:
    assert {name: load_reducer(name).__dataclass_fields__["keep"].default for name in REDUCERS} == INNER
    assert all(choose_methods(PLAIN, prune=name).keep == keep for name, keep in INNER.items())
    assert choose_methods(PLAIN, prune="holitom").keep == DEFAULT_KEEP
    assert choose_methods(PLAIN, prune="holitom+fastv").keep == DEFAULT_KEEP
    assert choose_methods(PLAIN, prune="carriers").keep == choose_methods(PLAIN).keep == 1.0


def test_a_method_inside_the_model_follows_one_behind_the_tower() -> None:
    both = choose_methods(PLAIN, prune="holitom+fastv", keep=0.25)
    assert (outer_part(both), inner_part(both)) == (("holitom", 0.25, {}), ("fastv", None, {}))
    alone = choose_methods(PLAIN, prune="fastv", keep=0.25, prune_options={"layer": 3})
    assert (outer_part(alone), inner_part(alone)) == (("none", 1.0, {}), ("fastv", 0.25, {"layer": 3}))
    outer = choose_methods(PLAIN, prune="holitom", keep=64, keep_image="16/frame", prune_options={"tau": 0.7})
    assert (outer_part(outer), inner_part(outer)) == (("holitom", 64, {"tau": 0.7}), None)
    assert outer_part(outer, "image") == ("holitom", "16/frame", {"tau": 0.7})


def test_settings_of_the_second_method_bear_its_name() -> None:
    options: dict[str, Option] = {"tau": 0.7, "fastv.layer": 3, "fastv.keep": 0.1}
    both = choose_methods(PLAIN, prune="holitom+fastv", prune_options=options)
    assert (outer_part(both), inner_part(both)) == (
        ("holitom", 0.25, {"tau": 0.7}),
        ("fastv", 0.1, {"layer": 3}),
    )


def test_what_a_request_leaves_out_is_the_deployments() -> None:
    deployed = MethodDefaults(prune="holitom", keep=64, keep_image=0.5, prune_options={"tau": 0.7})
    assert choose_methods(deployed) == Methods(
        prune="holitom", keep=64, keep_image=0.5, prune_options={"tau": 0.7}
    )
    more = choose_methods(deployed, keep=0.1, prune_options={"beta": 0.5})
    assert (more.keep, more.keep_image, more.prune_options) == (0.1, 0.5, {"tau": 0.7, "beta": 0.5})
    assert choose_methods(deployed, prune="none") == Methods()
    assert choose_methods(deployed, prune="evs") == Methods(prune="evs", keep=64, keep_image=0.5)
    assert choose_methods(deployed, prune="fastv") == Methods(prune="fastv", keep=0.5)
    assert choose_methods(deployed, prune="carriers") == Methods(prune="carriers")


def test_what_was_chosen_can_be_chosen_again() -> None:
    for name in NAMES["prune"]:
        chosen = choose_methods(PLAIN, prune=name)
        assert choose_methods(PLAIN, **msgspec.to_builtins(chosen)) == chosen


def test_the_settings_of_a_deployments_pattern_are_not_anothers() -> None:
    deployed = MethodDefaults(
        attention="mminference",
        attention_options={"sink": 4},
        attention_dense_below=100,
        attention_profile="p.json",
    )
    usual = choose_methods(deployed)
    assert (usual.attention, usual.attention_options) == ("mminference", {"sink": 4})
    assert (usual.attention_dense_below, usual.attention_profile) == (100, "p.json")
    assert usual.has_settings
    more = choose_methods(deployed, attention_options={"local": 9}, attention_dense_below=0)
    assert (more.attention_options, more.attention_dense_below) == ({"sink": 4, "local": 9}, 0)
    other = choose_methods(deployed, attention="a_shape")
    assert (other.attention_options, other.attention_dense_below) == ({}, 100)
    assert other.attention_profile is None
    assert choose_methods(deployed, attention="flux").attention_profile is None
    offered = MethodDefaults(attention_profile="p.json")
    assert choose_methods(offered, attention="mminference").attention_profile == "p.json"
    dense = choose_methods(deployed, attention="dense")
    assert dense == Methods()
    assert not dense.has_settings


def test_the_settings_of_a_deployments_kv_method_are_not_anothers() -> None:
    deployed = MethodDefaults(kv="snapkv", kv_budget=0.5, kv_options={"window": 8})
    assert choose_methods(deployed).kv_options == {"window": 8}
    assert choose_methods(deployed, kv_options={"pool": 3}).kv_options == {"window": 8, "pool": 3}
    other = choose_methods(deployed, kv="h2o")
    assert (other.kv_budget, other.kv_options) == (0.5, {})
    assert choose_methods(deployed, kv="none").kv_options == {}


IMPOSSIBLE: list[tuple[dict[str, Any], str]] = [
    ({"keep": 0.5}, "Expected keep only with prune, which names the method that keeps so much, but got 0.5"),
    ({"prune": "none", "keep": 64}, "Expected keep only with prune"),
    ({"keep_image": 0.5}, "Expected keep_image only with prune"),
    ({"prune_options": {"tau": 1}}, "Expected prune_options only with prune"),
    ({"prune": "carriers", "keep": 0.5}, "no keep with prune carriers, which keeps one token per frame"),
    ({"prune": "carriers", "keep_image": "4/frame"}, "no keep_image with prune carriers"),
    ({"prune": "fastv", "keep": 64}, "keep of at most 1 with prune fastv, which thins out"),
    ({"prune": "fastv", "keep": "4/frame"}, "but got '4/frame'"),
    ({"prune": "fastv", "keep_image": 0.5}, "no keep_image with prune fastv, which thins out"),
    ({"prune": "holitom", "keep": 0}, "keep of above 0"),
    ({"prune": "holitom", "keep_image": 1.5}, "keep_image of above 0"),
    ({"prune": "holitom", "prune_options": {"tau": math.inf}}, "prune_options.tau to be a number"),
    ({"prune": "holitom", "prune_options": {"tau": [1]}}, "prune_options.tau to be a number"),
    (
        {"prune": "holitom", "prune_options": dict.fromkeys(map(str, range(17)), 1)},
        "at most 16 prune_options",
    ),
    ({"prune": "holitm"}, "Expected prune to be one of none, random"),
    ({"attention": "x"}, "Expected attention to be one of dense"),
    ({"attention_options": {"sink": 1}}, "Expected attention_options only with attention"),
    ({"attention": "a_shape", "attention_options": {"sink": [1]}}, "attention_options.sink to be a number"),
    ({"attention_dense_below": 5}, "with a sparse attention, but got 5 with dense"),
    ({"attention": "a_shape", "attention_dense_below": -1}, "attention_dense_below of 0 to"),
    ({"attention": "a_shape", "attention_profile": "p"}, "attention_profile only with attention mminference"),
    ({"attention": "a_shape", "prune": "carriers"}, "Expected attention dense with prune carriers"),
    ({"kv": "x"}, "Expected kv to be one of none"),
    ({"kv_budget": -1}, "Expected kv_budget of more than 0"),
    ({"kv_options": {"window": 8}}, "Expected kv_options only with kv"),
    ({"kv": "snapkv", "kv_options": {"window": [8]}}, "kv_options.window to be a number"),
]


@pytest.mark.parametrize(("given", "why"), IMPOSSIBLE, ids=lambda case: str(case)[:60])
def test_an_impossible_pair_is_refused_and_says_why(given: dict[str, Any], why: str) -> None:
    with pytest.raises(BadRequest, match=re.escape(why)) as refused:
        choose_methods(PLAIN, **given)
    assert refused.value.status == 400


def test_a_deployment_is_held_to_the_same_rules() -> None:
    for defaults in (MethodDefaults(keep=0.5), MethodDefaults(prune="carriers", keep=0.5)):
        with pytest.raises(BadRequest, match="Expected"):
            choose_methods(defaults)


def test_only_a_share_behind_the_tower_can_fall_under_load() -> None:
    load = PruneUnderLoad(floor=0.1, floors={5: 0.02, 6: 0.9})
    deployed = ServeConfig(methods=MethodDefaults(prune="holitom"), prune_under_load=load)
    methods = deployed_methods(deployed)
    assert [least_keep(load, priority, methods) for priority in (0, 5, 6)] == [0.1, 0.02, None]
    assert least_keep(PruneUnderLoad(), 0, methods) is None
    for wrong in (PLAIN, MethodDefaults(prune="fastv"), MethodDefaults(prune="carriers")):
        with pytest.raises(ConfigError, match="prune_under_load only with"):
            deployed_methods(ServeConfig(methods=wrong, prune_under_load=load))
    with pytest.raises(ConfigError, match="keep 64"):
        deployed_methods(
            ServeConfig(
                methods=MethodDefaults(prune="evs", keep=64), prune_under_load=PruneUnderLoad(floor=0.1)
            )
        )
    with pytest.raises(ConfigError, match="Expected keep only with prune"):
        deployed_methods(ServeConfig(methods=MethodDefaults(keep=0.5)))


@pytest.mark.parametrize(
    "prune",
    [
        "fastv+holitom",
        "fastv+fastv",
        "holitom+uniform",
        "holitom+",
        "+fastv",
        "holitom+fastv+fastv",
        "x+fastv",
        "none+fastv",
        "carriers+fastv",
    ],
)
def test_other_pairs_are_refused(prune: str) -> None:
    with pytest.raises(BadRequest, match="Expected prune"):
        choose_methods(PLAIN, prune=prune, keep=0.5)


def test_the_api_process_loads_no_model_library() -> None:
    libraries = {"torch", "transformers", "triton", "PIL", "av", "decord", "gradio"}
    code = (
        f"import sys, mmserve.server.main\nsys.exit(' '.join(sorted({libraries!r} & set(sys.modules))) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
